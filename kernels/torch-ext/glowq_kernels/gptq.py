"""The product with a weight in GPTQ's layout, a correction included."""

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
) -> Tensor:
    """y = W x + bias + A (B x) in one launch, where W is in GPTQ's layout.

    The weight at input channel k and output n is (q[k, n] - (zero[g, n] + zero_offset)) * scale[g, n], g being the
    group of the channel. Made for 1 to 16 tokens; any number is right. Sums are float32, and the output is rounded
    once. One token, or a group size that 32 divides (or one group) without `g_idx`, rounds no weight; otherwise
    weights are first rounded to the dtype of x, as a dequantized weight would be.

    Args:
        x: inputs, shape (..., d), of any strides, float16, bfloat16 or float32; d a multiple of 8.
        qweight: shape (d / 8, o), int32: channels 8 i to 8 i + 7 of an output share a word, the first in its lowest
            bits; o a multiple of 8.
        qzeros: zero points, shape (groups, o / 8), int32, packed along the outputs in the same way.
        scales: shape (groups, o), float16, bfloat16 or float32.
        bits: 4; nothing else is implemented.
        group_size: consecutive input channels of a group, or -1 for one group of all.
        g_idx: group of each input channel, shape (d,), int32 or int64, every entry below the number of groups, which
            is not checked. None for groups of consecutive channels, which is much faster than a `g_idx` that says so.
        zero_offset: added to each zero point: 1 for files of AutoGPTQ's first format, else 0.
        bias: shape (o,), float16, bfloat16 or float32.
        product: B x as `right` returns it, shape (..., r), float16, bfloat16 or float32; None for no correction.
        left: left factor A, shape (o, r), as for `left_add_`; together with `product`.
        left_scale: shape (o,), float32, for an int8 left factor.

    Returns:
        Shape (..., o), contiguous, dtype of x.

    Raises:
        KernelError: dtypes, shapes, devices or the layout do not fit, a gradient is wanted, or the kernels cannot run
            here.

    Source: the layout of Frantar et al., GPTQ (arXiv 2210.17323), as AutoGPTQ and gptqmodel store it.
    """
    check_gptq(x, qweight, qzeros, scales, bits, group_size, g_idx, bias, product, left, left_scale)
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
                output.view(-1, outputs),
                group_size=0 if scales.shape[0] == 1 else group_size,
                zero_offset=zero_offset,
            )
    return output
