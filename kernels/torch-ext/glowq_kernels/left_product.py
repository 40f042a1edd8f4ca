"""The product with the stacked left factors of a group, added to its outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_left_add
from .launching import device, kernels

__all__ = ["left_add_"]


def left_add_(
    output: Tensor, product: Tensor, left: Tensor, scale: Tensor | None = None, multipliers: Tensor | None = None
) -> None:
    """Add A (B x) to the outputs in place.

    One launch serves all members of a group if their outputs are one tensor. The sum is computed in float32 and
    rounded once, to the dtype of `output`.

    Args:
        output: outputs Q x, shape (..., o), float16, bfloat16 or float32, of any strides, for example a slice of the
            last dimension. It must not share memory with the other arguments.
        product: B x as `right` returns it, shape (..., r), float16, bfloat16 or float32.
        left: left factor A, shape (o, r), of any strides, float16, bfloat16, float32, or int8 with `scale`. Or its
            codes in blocks of 32 outputs (see `triton_blocks`), uint8, shape (blocks, r, 16 or 12), with `scale`.
        scale: shape (o,), float32, only for int8 and codes. Each row of A is the row of `left` times its scale.
        multipliers: shape (blocks, r), int8, only for codes.

    Raises:
        KernelError: dtypes, shapes or devices do not match, elements of `output` share memory, autograd would need a
            gradient, or the kernels cannot run on this machine.

    Source: the left half of GlowQ's correction y = Q x + A (B x) (arXiv 2603.25385, sec. 3).
    """
    check_left_add(output, product, left, scale, multipliers)
    if not output.numel():
        return
    outputs, rank = output.shape[-1], left.shape[1]
    with device(output):
        flat = output.reshape(-1, outputs)  # a copy if one stride cannot describe the leading dimensions
        kernels("triton_left", output).launch(flat, product.reshape(-1, rank).contiguous(), left, scale, multipliers)
        if flat.data_ptr() != output.data_ptr():
            output.copy_(flat.view(output.shape))
        elif not output.is_inference():
            torch.autograd.graph.increment_version(output)  # like every in-place operation of torch
