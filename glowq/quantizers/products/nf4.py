"""The product of bitsandbytes' 4-bit modules and a correction in one kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import glowq_kernels

from .derived import Derived

__all__ = ["Product"]


class Product:
    """See `Backend.fused_product`.

    With double quantization, the scales are dequantized once and cached in float32: four bytes per block of values.
    """

    def __init__(self) -> None:
        self._absmax = Derived()

    def __call__(self, module: Any, x: Tensor) -> Callable[..., Tensor] | None:
        weight, state = module.weight.data, getattr(module.weight, "quant_state", None)
        if state is None or getattr(state, "packing_format_for_cpu", False) or weight.device != x.device:
            return None
        # If rows end inside a block, bitsandbytes itself reads some weights wrongly on the CPU.
        if len(state.shape) != 2 or x.shape[-1] != state.shape[1] or state.shape[1] % state.blocksize:
            return None
        if x.numel() and not module.compute_type_is_set:  # as in the first forward of Linear4bit
            module.set_compute_type(x)
            module.compute_type_is_set = True
        dtype, bias = module.compute_dtype or x.dtype, module.bias
        return partial(
            glowq_kernels.nf4_linear,
            x.to(dtype),
            weight if weight.dtype is torch.uint8 else weight.view(torch.uint8),
            self._scales(state),
            state.code,
            blocksize=state.blocksize,
            out_features=state.shape[0],
            bias=None if bias is None else bias.to(dtype),
        )

    def _scales(self, state: Any) -> Tensor:
        """One scale per block, float32, shape (blocks,)."""
        if not state.nested:
            return state.absmax
        nested = state.state2
        tensors = (state.absmax, nested.absmax, nested.code, state.offset)
        return self._absmax.of(partial(_dequantized_scales, state), *tensors, key=nested.blocksize)


def _dequantized_scales(state: Any) -> Tensor:
    """The scales of a module with double quantization, dequantized: shape (blocks,), float32."""
    from bitsandbytes.functional import dequantize_blockwise

    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
