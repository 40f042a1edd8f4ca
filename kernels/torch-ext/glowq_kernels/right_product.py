"""The product with a group's right factor."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_right
from .launching import device, kernels

__all__ = ["right"]


def right(x: Tensor, right: Tensor, scale: Tensor | None = None, multipliers: Tensor | None = None) -> Tensor:
    """Compute B x, the product with a group's right factor. Every member of the group uses the result.

    The kernel runs in one launch. Each program takes one row of B, splits the input channels over its threads and adds
    their sums in a fixed order. It is optimized for 1 to 16 tokens and accepts any number; above about 16 tokens
    torch's matrix product is faster.

    Args:
        x: inputs, shape (..., d), of any strides, float16, bfloat16 or float32.
        right: right factor B, shape (r, d), of any strides, float16, bfloat16, float32, or int8 with `scale`. Or its
            codes in blocks of 32 channels (see `triton_blocks`), uint8, shape (r, blocks, 16 or 12), with `scale`.
        scale: shape (r,), float32, only for int8 and codes. Each row of B is the row of `right` times its scale.
        multipliers: shape (r, blocks), int8, only for codes.

    Returns:
        Shape (..., r), contiguous. The dtype is that of a floating-point `right`, or that of x for integers. The sums
        are float32.

    Raises:
        KernelError: dtypes, shapes or devices do not match, autograd would need a gradient, or the kernels cannot run
            on this machine.

    Source: the right half of GlowQ's correction y = Q x + A (B x) (arXiv 2603.25385, sec. 3).
    """
    check_right(x, right, scale, multipliers)
    rank = right.shape[0]
    dtype = right.dtype if right.dtype.is_floating_point else x.dtype
    output = torch.empty((*x.shape[:-1], rank), dtype=dtype, device=x.device)
    if output.numel():
        with device(x):
            kernels("triton_right", x).launch(
                x.reshape(-1, x.shape[-1]), right, scale, multipliers, output.view(-1, rank)
            )
    return output
