"""Where the values of a tensor lie, to tell that two tensor objects hold the same ones."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

__all__ = ["place"]


def place(x: Tensor) -> tuple[Tensor, Hashable]:
    """The tensor that `x` is a view of, and how `x` lies in it.

    Two tensors with the same of both, at the same version, hold the same vectors (along the last dimension) in the same
    order; the other dimensions may be divided differently, as in hidden states of shape (1, n, d) and (n, d).

    Args:
        x: any tensor.

    Returns:
        `x` itself if it is no view, and a value to compare; `x` and None if its place cannot be told (no strides, no
        dimension, or values that are only negated or conjugated when they are read).
    """
    if x.layout is not torch.strided or x.dim() == 0 or x.is_neg() or x.is_conj():
        return x, None
    root = x if x._base is None else x._base
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if strides and strides[-1] == stride * size:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    return root, (x.dtype, x.storage_offset(), x.shape[-1], x.stride(-1), *sizes, *strides)
