"""Write the files of a correction's small form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save

from ..errors import ConfigError
from .factor_tensors import with_checksums
from .saved import FACTORS_FILE

if TYPE_CHECKING:
    from .correction import Correction

__all__ = ["write_correction"]


def write_correction(correction: Correction, folder: Path) -> None:
    """Write config.json, the factors, the tokenizer, custom code and the model card into an empty folder.

    Raises:
        ConfigError: the base, as it is in memory, is stored nowhere.
    """
    if correction.unstored is not None:
        raise ConfigError(
            f"{correction.unstored}, so that the base is stored nowhere that a correction could name. Save the model "
            "in one piece (model.save_pretrained, or `glowq correct --format full`), or save the quantized model first "
            "and correct what you saved."
        )
    config = {**correction.model_config, "transformers_weights": FACTORS_FILE}
    tensors, stored = correction.tensors(), correction.config.to_dict()
    config["quantization_config"] = {**stored, "groups": with_checksums(stored["groups"], tensors)}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / FACTORS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
    if correction.tokenizer is not None:
        correction.tokenizer.save_pretrained(folder)
    if correction.generation_config is not None:
        # generation_config.save_pretrained refuses the settings of many published models.
        (folder / "generation_config.json").write_text(correction.generation_config.to_json_string())
    for name, content in correction.code.items():
        (folder / name).write_bytes(content)
    correction.write_card(folder)
