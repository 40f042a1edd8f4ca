"""The base of an adapter: where its files are, how it is quantized, and the code that loads it."""

from __future__ import annotations

import pprint
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...artifact.base_files import base_folder, refuse_unsafe
from ...artifact.config import GlowQConfig
from ...artifact.fingerprint import verify_fingerprint
from ...errors import ConfigError, ExportError
from ...models.forward import example_inputs
from ...models.load_errors import loading
from ...models.loading import load_config, model_class
from ...quantizers.loading.dense import mark_dense
from ...quantizers.model import prepare_model
from ...quantizers.registry import is_calibrated, method_of, own_quantizers
from ...quantizers.settings import base_settings
from ...utils.snapshots import local_snapshot
from ..export.common import first_output

__all__ = ["Base", "find_base", "load_base"]


@dataclass(frozen=True)
class Base:
    """The base of an adapter, not loaded.

    Attributes:
        name, revision: Hub name and revision, or folder, from which users load the base.
        folder: local folder with its files.
        quantization: quantization config to load the base with; None if its files need none.
        unpacks: whether the weights that PEFT reads exist only after a first forward (compressed-tensors).
    """

    name: str
    revision: str | None
    folder: Path
    quantization: Any
    unpacks: bool

    def load_code(self, model: Any) -> str:
        """Python code that loads the base into the variable `base`.

        Args:
            model: a model of the base's class and dtype.
        """
        causal = model.can_generate() and not model.config.is_encoder_decoder
        kind = "AutoModelForCausalLM" if causal else type(model).__name__
        options = [repr(self.name), f'dtype="{str(model.dtype).removeprefix("torch.")}"']
        if self.revision is not None:
            options.append(f"revision={self.revision!r}")
        lines = [f"from transformers import {kind}"]
        if method_of(self.quantization) in own_quantizers():
            lines.insert(0, "import glowq  # without it transformers cannot quantize this base")
        if self.quantization is not None:
            options.append("quantization_config=quantization")
            lines += ["", f"quantization = {pprint.pformat(self._settings(), width=100, sort_dicts=True)}"]
        lines.append(f"base = {kind}.from_pretrained({', '.join(options)})")
        if self.unpacks:
            lines.append("base(**base.dummy_inputs)  # unpacks the weights, which PEFT looks for")
        return "\n".join(lines)

    def _settings(self) -> dict[str, Any]:
        stored = {name: value for name, value in self.quantization.to_dict().items() if not name.startswith("_")}
        return {**stored, "quant_method": method_of(self.quantization)}


def find_base(source: str, config: GlowQConfig, base_model: str | None) -> Base:
    """Find the base of the corrected model `source`.

    Args:
        source: folder or Hub name of the corrected model.
        config: the glowq config in its config.json.
        base_model: folder or Hub name of the base, if it is not the one that `config` names.

    Raises:
        ExportError: the base is stored nowhere, or cannot be loaded without the correction.
        UnsafePathError: `source` is a repository of the Hub, and names a local folder as its base.
    """
    stored: dict[str, Any] = config.base_model or {}
    if base_model is not None:
        folder = local_snapshot(base_model)
        name, revision = str(folder.resolve()) if Path(base_model).is_dir() else base_model, None
    else:
        refuse_unsafe([], source, config)
        try:
            folder = base_folder(config)
        except ConfigError as error:
            raise ExportError(f"{error} An adapter needs a base in files: name one with --base-model.") from error
        name, revision = stored["name"], stored["revision"]
    is_quantized = getattr(load_config(str(folder)), "quantization_config", None) is not None
    if is_quantized or method_of(config.base) == "dense":
        return Base(name, revision, folder, None, unpacks=method_of(config.base) == "compressed-tensors")
    settings = base_settings(config.base)
    if is_calibrated(settings):
        raise ExportError(
            f"the base of {source} was quantized in memory ({method_of(config.base)}) and is stored only in {source} "
            f"itself, which PEFT cannot load. Save it: model = {_class_name(source)}.from_pretrained({source!r}); "
            "glowq.detach(model); model.save_pretrained('base'). Then give --base-model base."
        )
    return Base(name, revision, folder, settings, unpacks=False)


def _class_name(source: str) -> str:
    return model_class(load_config(source)).__name__


def load_base(base: Base, config: GlowQConfig, dtype: torch.dtype) -> Any:
    """Load the base without any correction, ready to run, and check that the correction was made for it.

    Raises:
        FingerprintError: the correction was made for other quantized weights.
    """
    options: dict[str, Any] = {} if base.quantization is None else {"quantization_config": base.quantization}
    if torch.cuda.is_available():
        options["device_map"] = "auto"
    kind = model_class(load_config(str(base.folder)))
    with loading(base.name):
        model = kind.from_pretrained(base.folder, dtype=dtype, use_safetensors=True, **options)
    if method_of(config.base) == "dense":
        mark_dense(model)
    prepare_model(model)
    verify_fingerprint(model, config)
    model.eval()
    if base.unpacks:
        first_output(model, example_inputs(model))
    return model
