"""GPTQ's product and a correction in one kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import glowq_kernels

from .derived import Derived

__all__ = ["Product", "consecutive"]


class Product:
    """See `Backend.fused_product`.

    It checks whether the groups are consecutive, and caches the result. Unlike gptqmodel's kernels, its kernel does not
    round the weight to the dtype of the scales.
    """

    def __init__(self) -> None:
        self._groups = Derived()

    def __call__(self, module: Any, x: Tensor) -> Callable[..., Tensor] | None:
        qweight, scales, g_idx = module.qweight, module.scales, module.g_idx
        if getattr(module, "linear_mode", None) == "inference" or qweight.dtype is not torch.int32:
            return None  # a kernel of gptqmodel has rewritten the weight
        if module.adapter or module.online_full_had or module.online_partial_had:
            return None  # the module computes more than a product
        if qweight.device != x.device or not x.shape[-1] == module.in_features == len(g_idx):
            return None
        shape = len(scales), x.device
        groups = self._groups.of(partial(_groups, g_idx, *shape), g_idx, key=shape)
        if groups is None:
            return None
        size, order = groups
        # The zero points need no offset: AutoGPTQ stores them minus one, but gptqmodel adds the one when it loads them.
        return partial(
            glowq_kernels.gptq_linear,
            x,
            qweight,
            module.qzeros,
            scales,
            group_size=size,
            g_idx=order,
            bias=getattr(module, "bias", None),
        )


def _groups(g_idx: Tensor, count: int, device: torch.device) -> tuple[int, Tensor | None] | None:
    """Group size and `g_idx` on `device`, as `gptq_linear` expects them; None if an entry is not a group's number."""
    index = g_idx.long()
    if int(index.min()) < 0 or int(index.max()) >= count:
        return None
    if count == 1:
        return -1, None
    size = consecutive(index, count)
    return (-(-len(index) // count), g_idx.to(device, torch.int32)) if size is None else (size, None)


def consecutive(index: Tensor, count: int) -> int | None:
    """Size of the groups if they are consecutive rows, all of one size but the last; None if they are not.

    Args:
        index: number of the group of each row, shape (d,), int64.
        count: number of groups.
    """
    size = max(1, int((index == 0).sum()))
    natural = torch.arange(len(index), device=index.device) // size
    return size if torch.equal(index, natural) and -(-len(index) // size) == count else None
