"""Plain float weights that are corrected as they are: GGUF, float8 and mxfp4 files that were dequantized on load.

Nothing tells such a module from one that was never quantized, so that this backend owns a module only after `mark`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...errors import ConfigError, UnsupportedModuleError
from ..base import Backend, Scheme
from ..model import quantized_modules
from ..registry import find_backend, method_of, register

__all__ = ["Dense", "DenseConfig", "DenseHfQuantizer", "adopt_dense", "dequantized_from", "mark_dense"]

_MARK = "glowq_corrects_dense_weight"
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class DenseConfig(QuantizationConfigMixin):
    """The base of a correction of dense weights: nothing quantizes them, nothing has to be loaded specially."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method: Any = "dense"  # transformers types it as one of its own methods


class DenseHfQuantizer(HfQuantizer):
    """Lets transformers load the weights as those of any model, and marks them."""

    def preprocess_model(self, model: nn.Module, dtype: Any = None, **kwargs: Any) -> None:
        """Leave the model as it is."""

    def postprocess_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Mark the model's linear layers."""
        mark_dense(model)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """The model's own state; without a correction it is saved as the plain model that it is."""
        config: Any = model.config
        if method_of(getattr(config, "quantization_config", None)) == "dense":
            del config.quantization_config
        return None, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Always: the weights are floats."""
        return True


@register
class Dense(Backend):
    """`nn.Linear` and transformers' `Conv1D` (GPT-2) with a plain float weight, once `mark` was called."""

    name = "dense"
    package = "torch"
    extra = ""
    tested = ""
    methods = ("dense",)

    def matches(self, module: nn.Module) -> bool:
        return _MARK in module.__dict__

    def weight(self, module: Any) -> Tensor:
        return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data

    def codes(self, module: Any) -> list[Tensor]:
        weight = module.weight.data.contiguous()
        return [weight.view(_BITS[weight.itemsize])]

    def scales(self, module: Any) -> list[Tensor]:
        return []

    def scheme(self, module: Any) -> Scheme:
        return Scheme(f"dense {str(module.weight.dtype).removeprefix('torch.')}", module.weight.itemsize * 8, 0)

    def features(self, module: Any) -> tuple[int, int]:
        rows, columns = module.weight.shape
        return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)

    def quantizers(self) -> dict[str, type]:
        return {"dense": DenseHfQuantizer}


def adopt_dense(model: nn.Module) -> None:
    """Make `model` one whose dense weights are its base, because the user asked for that.

    Raises:
        ConfigError: it holds quantized modules, which are corrected as such.
        UnsupportedModuleError: it holds no linear layer with a plain float weight.
    """
    others = {name: backend.name for name, backend in quantized_modules(model).items() if backend.name != "dense"}
    if others:
        name, backend = next(iter(others.items()))
        raise ConfigError(
            f"the model's weights are quantized and stay so ({name}: {backend}): leave out dense=True (--base dense) "
            "to correct them as they are."
        )
    mark_dense(model)
    config: Any = getattr(model, "config", None)
    if config is not None:
        # A GGUF model goes on naming GGUF's quantizer, which could neither save nor load what it is now.
        config.quantization_config = DenseConfig()
        model.hf_quantizer = DenseHfQuantizer(config.quantization_config)  # type: ignore[assignment]
        model.is_quantized = False  # type: ignore[assignment]
        model.__dict__.pop("quantization_method", None)


def mark_dense(model: nn.Module) -> None:
    """Let `find_backend` own every linear layer of `model` but the head, which quantizers leave alone.

    Raises:
        UnsupportedModuleError: it holds no linear layer with a plain float weight.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    found = [module for module in model.modules() if module is not head and _is_dense(module)]
    if not found:
        raise UnsupportedModuleError(
            f"{type(model).__name__} holds no linear layer with a plain float weight outside of its head: there is "
            "nothing to correct."
        )
    for module in found:
        setattr(module, _MARK, True)


def dequantized_from(model: nn.Module) -> str | None:
    """The `quant_method` that `model` was dequantized from while loading, as far as its files tell; else None."""
    config: Any = getattr(model, "config", None)
    name: Any = getattr(config, "_name_or_path", None)
    stored: Any = getattr(config, "quantization_config", None)
    if stored is None and name:
        try:
            files, _ = PreTrainedConfig.get_config_dict(name, local_files_only=True)
        except (OSError, ValueError):  # no config.json beside the weights, or none in the cache
            return None
        stored = files.get("quantization_config")
    return None if stored is None else method_of(stored)


def _is_dense(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(module, nn.Linear | Conv1D)
        and isinstance(weight, Tensor)
        and type(weight.data) is Tensor
        and weight.is_floating_point()
        and weight.itemsize in _BITS
        and _is_free(module)
    )


def _is_free(module: nn.Module) -> bool:
    owner = find_backend(module)
    return owner is None or owner.name == "dense"
