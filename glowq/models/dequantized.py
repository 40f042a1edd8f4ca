"""Quantized layers that multiply by their dequantized weight, which is kept from one call to the next.

On a CPU, libraries dequantize a weight at every call, which takes as long as its product with some hundred tokens.
Calibration calls the same layers with many batches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantizers.base import Backend
from ..quantizers.model import quantized_modules

__all__ = ["dequantized"]

_SHARE = 1 / 4  # of the memory that is free: as many weights are kept as fit


@contextmanager
def dequantized(model: nn.Module) -> Iterator[None]:
    """Inside this context, quantized layers on the CPU multiply by dequantized weights; their forwards come back after.

    The weights are those that the libraries' kernels multiply by, in the model's dtype. They must not change inside of
    the context. Those used last are kept, up to a quarter of the free memory. Layers that also round their inputs, that
    may compute something else than W x + b, or whose weights are offloaded, run as they are.
    """
    weights = _Weights(int(psutil.virtual_memory().available * _SHARE))
    dtype = getattr(model, "dtype", torch.float32)
    with ExitStack() as stack:
        for name, backend in quantized_modules(model).items():
            module: Any = model.get_submodule(name)
            has_own = "forward" in vars(module) or backend.may_differ(module) or backend.rounds_inputs(module)
            if _on_cpu(module) and not has_own:
                module.forward = partial(_forward, module, weights, name, backend, dtype)
                stack.callback(vars(module).pop, "forward", None)
        yield


class _Weights:
    """The dequantized weights that were used last, by module name, as many as fit in `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def weight(self, name: str, module: Any, backend: Backend, dtype: torch.dtype) -> Tensor:
        """The weight of a module, shape (out_features, in_features), from what is kept or from the backend."""
        found = self._kept.get(name)
        if found is not None:
            self._kept.move_to_end(name)
            return found
        with torch.inference_mode(False), torch.no_grad():
            found = backend.weight(module).detach().to(dtype)
        self._kept[name] = found
        self._bytes += found.nbytes
        while self._bytes > self._limit and self._kept:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return found


def _forward(
    module: Any,
    weights: _Weights,
    name: str,
    backend: Backend,
    dtype: torch.dtype,
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if args or kwargs or x.dtype is not dtype:  # the library knows what these mean
        return type(module).forward(module, x, *args, **kwargs)
    bias: Any = getattr(module, "bias", None)
    return F.linear(x, weights.weight(name, module, backend, dtype), None if bias is None else bias.to(dtype))


def _on_cpu(module: nn.Module) -> bool:
    tensors = [*module.parameters(), *module.buffers()]
    return bool(tensors) and all(tensor.device.type == "cpu" for tensor in tensors)
