"""The product with a weight in GPTQ's layout, with or without a correction."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_gptq
from .launching import device, kernels

__all__ = ["gptq_linear"]


def gptq_linear(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    *,
    bits: int = 4,
    group_size: int,
    g_idx: Tensor | None = None,
    zero_offset: int = 0,
    bias: Tensor | None = None,
    product: Tensor | None = None,
    left: Tensor | None = None,
    left_scale: Tensor | None = None,
    left_multipliers: Tensor | None = None,
) -> Tensor:
    """Compute y = W x + bias + A (B x) in one launch, where W is in GPTQ's layout.

    The weight at input channel k and output n is (q[k, n] - (zero[g, n] + zero_offset)) * scale[g, n], where g is the
    group of channel k.

    The kernel is optimized for 1 to 16 tokens and accepts any number. It sums in float32 and rounds the output once.
    With one token it does not round the weight. With more tokens it does not round the weight if `g_idx` is None and
    the group size is a multiple of 32 (or all channels are one group); otherwise it rounds the weight to the dtype of
    x, as a dequantized weight would be rounded.

    Args:
        x: inputs, shape (..., d), of any strides, float16, bfloat16 or float32; d is a multiple of 8.
        qweight: shape (d / 8, o), int32; o is a multiple of 8. Channels 8 i to 8 i + 7 of an output share a word, and
            the first channel is in the lowest bits.
        qzeros: zero points, shape (groups, o / 8), int32, packed along the outputs in the same way.
        scales: shape (groups, o), float16, bfloat16 or float32.
        bits: must be 4.
        group_size: number of consecutive input channels in a group, or -1 if all channels are one group.
        g_idx: group of each input channel, shape (d,), int32 or int64. Every entry must be below the number of groups;
            this is not checked. None means that each group is a run of consecutive channels, which is much faster than
            a `g_idx` with the same groups.
        zero_offset: added to each zero point: 1 for files of AutoGPTQ's first format, otherwise 0.
        bias: shape (o,), float16, bfloat16 or float32.
        product: B x as `right` returns it, shape (..., r), float16, bfloat16 or float32; None for no correction.
        left: left factor A, of the shapes, dtypes and strides that `left_add_` accepts; required with `product`.
        left_scale: shape (o,), float32, for a left factor of integers.
        left_multipliers: see `multipliers` of `left_add_`.

    Returns:
        Shape (..., o), contiguous, dtype of x.

    Raises:
        KernelError: dtypes, shapes, devices or the layout do not match, autograd would need a gradient, or the kernels
            cannot run on this machine.

    Source: the layout of Frantar et al., GPTQ (arXiv 2210.17323), as AutoGPTQ and gptqmodel store it.
    """
    check_gptq(x, qweight, qzeros, scales, bits, group_size, g_idx, bias, product, left, left_scale, left_multipliers)
    inputs, outputs = x.shape[-1], qweight.shape[1]
    output = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    if output.numel():
        with device(x):
            kernels("triton_gptq", x).launch(
                x.reshape(-1, inputs),
                qweight,
                qzeros,
                scales,
                g_idx,
                bias,
                None if product is None else product.reshape(-1, product.shape[-1]).contiguous(),
                left,
                left_scale,
                left_multipliers,
                output.view(-1, outputs),
                group_size=0 if scales.shape[0] == 1 else group_size,
                zero_offset=zero_offset,
            )
    return output
