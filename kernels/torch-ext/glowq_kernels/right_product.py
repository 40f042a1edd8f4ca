"""The product with a group's right factor."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_right
from .launching import device, kernels

__all__ = ["right"]


def right(x: Tensor, right: Tensor, scale: Tensor | None = None) -> Tensor:
    """The product B x of a group's right factor, which every member of the group goes on with.

    One launch: each program takes one row of B, splits the input channels over its threads and adds them up in a fixed
    order. Made for 1 to 16 tokens; any number is right, but beyond about 16 a matrix product of torch is faster.

    Args:
        x: inputs, shape (..., d), of any strides, float16, bfloat16 or float32.
        right: right factor B, shape (r, d), of any strides, float16, bfloat16, float32, or int8 with `scale`.
        scale: shape (r,), float32: B is `right` times its row's scale. For int8 only.

    Returns:
        Shape (..., r), contiguous, in the dtype of `right` if that is floating point, else of x. Summed in float32.

    Raises:
        KernelError: dtypes, shapes or devices do not fit, a gradient is wanted, or the kernels cannot run here.

    Source: the right half of GlowQ's correction y = Q x + A (B x) (arXiv 2603.25385, sec. 3).
    """
    check_right(x, right, scale)
    rank = right.shape[0]
    dtype = right.dtype if right.dtype.is_floating_point else x.dtype
    output = torch.empty((*x.shape[:-1], rank), dtype=dtype, device=x.device)
    if output.numel():
        with device(x):
            kernels("triton_right", x).launch(x.reshape(-1, x.shape[-1]), right, scale, output.view(-1, rank))
    return output
