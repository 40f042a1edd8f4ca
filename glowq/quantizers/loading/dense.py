"""Mark the linear layers whose plain float weights hold quantized values, on loading or when a user asks for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...errors import ConfigError, UnsupportedModuleError
from ..base import DENSE_MARK
from ..experts import WHOLE, open_experts
from ..model import quantized_modules
from ..registry import find_backend, method_of

__all__ = ["DenseConfig", "DenseHfQuantizer", "adopt_dense", "dequantized_from", "mark_dense"]

_ITEMSIZES = (2, 4, 8)  # of the dtypes that are corrected


class DenseConfig(QuantizationConfigMixin):
    """Quantization config of a base model with dense weights, which is loaded like a model without quantization."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method: Any = "dense"  # Any: the annotation in transformers allows only its own methods


class DenseHfQuantizer(HfQuantizer):
    """Lets transformers load the weights like those of a model without quantization, then marks the linear layers."""

    def preprocess_model(self, model: nn.Module, dtype: Any = None, **kwargs: Any) -> None:
        """Do nothing: the modules need no change before loading."""

    def postprocess_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Mark the model's linear layers."""
        mark_dense(model)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """Save the model's own state. A model without a correction is saved without a quantization config."""
        config: Any = model.config
        if method_of(getattr(config, "quantization_config", None)) == "dense":
            del config.quantization_config
        return None, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Always true: the weights are floats."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Always true: the weights are floats."""
        return True


def adopt_dense(model: nn.Module) -> None:
    """Prepare `model` for a correction of its dense weights, because the user asked for that.

    Raises:
        ConfigError: the model holds quantized modules, which are corrected without `dense`.
        UnsupportedModuleError: the model holds no linear layer with a plain float weight.
    """
    others = {name: backend.name for name, backend in quantized_modules(model).items() if backend.name != "dense"}
    if others:
        name, backend = next(iter(others.items()))
        raise ConfigError(
            f"the model holds quantized modules ({name}: {backend}), not dense weights: leave out dense=True (--base "
            "dense) to correct the quantized modules."
        )
    mark_dense(model)
    config: Any = getattr(model, "config", None)
    if config is not None:
        # A GGUF model still names GGUF's quantizer, which can neither save nor load the dequantized model.
        config.quantization_config = DenseConfig()
        model.hf_quantizer = DenseHfQuantizer(config.quantization_config)  # type: ignore[assignment]
        model.is_quantized = False  # type: ignore[assignment]
        model.__dict__.pop("quantization_method", None)


def mark_dense(model: nn.Module) -> None:
    """Mark every linear layer of `model` except its head, so that `find_backend` returns this backend for them.

    Experts get a module each, see `open_experts`.

    The head is left out because quantizers do not quantize it.

    Raises:
        UnsupportedModuleError: the model holds no linear layer with a plain float weight.
    """
    open_experts(model, lambda stack: WHOLE if _is_plain(stack) else None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    found = [module for module in model.modules() if module is not head and _is_dense(module)]
    if not found:
        raise UnsupportedModuleError(
            f"{type(model).__name__} holds no linear layer with a plain float weight outside of its head: there is "
            "nothing to correct."
        )
    for module in found:
        setattr(module, DENSE_MARK, True)


def dequantized_from(model: nn.Module) -> str | None:
    """The `quant_method` that `model` was dequantized from while loading; None if its config and files name none."""
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
    return (
        isinstance(module, nn.Linear | Conv1D)
        and _is_plain(getattr(module, "weight", None))
        and _has_no_other_backend(module)
    )


def _is_plain(weight: Any) -> bool:
    return (
        isinstance(weight, Tensor)
        and type(weight.data) is Tensor
        and weight.is_floating_point()
        and weight.itemsize in _ITEMSIZES
    )


def _has_no_other_backend(module: nn.Module) -> bool:
    backend = find_backend(module)
    return backend is None or backend.name == "dense"
