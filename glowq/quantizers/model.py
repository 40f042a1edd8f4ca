"""Functions for a whole quantized model: find its modules, prepare and check them, read their weights and bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..errors import BackendError, NonFiniteError
from ..utils.versions import warn_untested
from .base import Backend
from .experts import WHOLE, open_experts, tensor_holder
from .registry import find_backend, holds_experts, method_of, own_quantizers

__all__ = ["check_scales", "packed_bytes", "prepare_model", "quantized_modules", "read_weight", "refuse_misloaded"]

_MISREAD = "if weights are read back wrongly, please report it"


def quantized_modules(model: nn.Module) -> dict[str, Backend]:
    """Every quantized linear layer of `model`, name -> backend, in module order."""
    found = ((name, find_backend(module)) for name, module in model.named_modules())
    return {name: backend for name, backend in found if backend is not None}


def refuse_misloaded(model: nn.Module) -> None:
    """Refuse a model that transformers loaded from a checkpoint whose weights it cannot read.

    Raises:
        BackendError: the model's weights are not those of the checkpoint; the message says how to load it.
    """
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    quantizer = getattr(quantizer, "base", quantizer)
    own = own_quantizers().get(method_of(config))
    if own is not None and getattr(quantizer, "pre_quantized", False) and not issubclass(own, type(quantizer)):
        raise BackendError(
            f"the model was loaded before glowq was imported, by {type(quantizer).__name__} of transformers, which "
            f"loads wrong weights for {method_of(config)} models. Import glowq first, then load the model."
        )


def prepare_model(model: nn.Module) -> dict[str, Backend]:
    """Make every quantized module of `model` safe to read, run and save; returns `quantized_modules(model)`.

    Quantized experts get a module each, see `open_experts`.
    """
    open_experts(model, lambda stack: WHOLE if holds_experts(stack) else None)
    modules = quantized_modules(model)
    dtype = getattr(model, "dtype", torch.float32)
    for name, backend in modules.items():
        warn_untested(backend.package, backend.tested, _MISREAD)
        module = model.get_submodule(name)
        with _naming(name), align_module_device(tensor_holder(module)):
            backend.prepare(module, dtype)
    return modules


def packed_bytes(model: nn.Module) -> int:
    """Bytes of all quantized weights at their nominal width, with their scales and zero points."""
    return sum(backend.packed_bytes(model.get_submodule(name)) for name, backend in quantized_modules(model).items())


def check_scales(model: nn.Module) -> None:
    """Refuse damaged scales. Called before the first forward, after which the damage would look like another error.

    Raises:
        BackendError: a module cannot be read exactly, or a scale is zero although the library never writes zero.
        NonFiniteError: a scale is NaN or Inf.
    """
    for name, backend in quantized_modules(model).items():
        module = model.get_submodule(name)
        with _naming(name), align_module_device(tensor_holder(module)):
            for scale in backend.scales(module):
                _check_scales(backend, name, scale)


def read_weight(backend: Backend, name: str, module: nn.Module) -> Tensor:
    """The dequantized weight of a quantized module. The module may be offloaded.

    Returns:
        float32 tensor of shape (out_features, in_features).

    Raises:
        BackendError: the weight cannot be read exactly, or a scale is zero although the library never writes zero.
        NonFiniteError: the scales or the weight hold NaN or Inf.
    """
    with _naming(name), align_module_device(tensor_holder(module)), torch.no_grad():
        for scale in backend.scales(module):
            _check_scales(backend, name, scale)
        weight = backend.weight(module).detach().to(torch.float32)
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(f"{name}: the dequantized weight holds NaN or Inf. Quantize the model again.")
    return weight


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Add the module's name to the message of a BackendError."""
    try:
        yield
    except BackendError as error:
        raise type(error)(f"{name}: {error}") from error


def _check_scales(backend: Backend, name: str, scales: Tensor) -> None:
    values = scales.float()
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"{name}: its quantization scales hold NaN or Inf. Download or quantize the model again.")
    if not backend.zero_scales and not bool(values.all()):
        raise BackendError(
            f"{int((values == 0).sum())} of its {values.numel()} quantization scales are zero, which "
            f"{backend.name} never writes: the checkpoint is damaged. Download or quantize the model again."
        )
