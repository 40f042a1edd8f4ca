"""The quantized model that an adapter goes onto: where it is, what quantizes it, and what to type to load it."""

from __future__ import annotations

import pprint
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...artifact.base_files import base_folder
from ...artifact.config import GlowQConfig, base_settings
from ...artifact.fingerprint import verify_fingerprint
from ...errors import ConfigError, ExportError
from ...models.forward import example_inputs
from ...models.loading import load_config, loading, model_class
from ...quantizers.libraries.dense import mark_dense
from ...quantizers.model import prepare_model
from ...quantizers.registry import is_calibrated, method_of, own_quantizers
from ...utils.hub import local_snapshot
from ..export.common import first_output

__all__ = ["Base", "find_base", "load_base"]


@dataclass(frozen=True)
class Base:
    """A base, not loaded.

    Attributes:
        name, revision: where anybody loads it from.
        folder: its files here.
        quantization: what it is quantized with while loading; None where its files hold what is needed.
        unpacks: whether its modules get the weights that PEFT looks for at the first forward (compressed-tensors).
    """

    name: str
    revision: str | None
    folder: Path
    quantization: Any
    unpacks: bool

    def load_code(self, model: Any) -> str:
        """The lines of Python that load it, as `base`; `model` is one of its class and dtype."""
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
    """The base of the corrected model `source`.

    Args:
        config: what its config.json says of the correction.
        base_model: folder or Hub name to take instead of what `config` names.

    Raises:
        ExportError: the base is stored nowhere, or cannot be loaded without the correction.
    """
    stored: dict[str, Any] = config.base_model or {}
    if base_model is not None:
        folder = local_snapshot(base_model)
        name, revision = str(folder.resolve()) if Path(base_model).is_dir() else base_model, None
    else:
        try:
            folder = base_folder(config)
        except ConfigError as error:
            raise ExportError(f"{error} An adapter needs a base in files: --base-model names one.") from error
        name, revision = stored["name"], stored["revision"]
    is_quantized = getattr(load_config(str(folder)), "quantization_config", None) is not None
    if is_quantized or method_of(config.base) == "dense":
        return Base(name, revision, folder, None, unpacks=method_of(config.base) == "compressed-tensors")
    settings = base_settings(config.base)
    if is_calibrated(settings):
        raise ExportError(
            f"the base of {source} was quantized in memory ({method_of(config.base)}) and its files are nowhere but in "
            f"{source} itself, which PEFT cannot load. Save it: model = {_auto(source)}.from_pretrained({source!r}); "
            "glowq.detach(model); model.save_pretrained('base'). Then give --base-model base."
        )
    return Base(name, revision, folder, settings, unpacks=False)


def _auto(source: str) -> str:
    return model_class(load_config(source)).__name__


def load_base(base: Base, config: GlowQConfig, dtype: torch.dtype) -> Any:
    """The base without any correction, ready to run; checked to be the one that the correction was made for.

    Raises:
        FingerprintError: it is another one.
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
