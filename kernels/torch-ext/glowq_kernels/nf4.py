"""The product with a weight in bitsandbytes' 4-bit layout, with or without a correction."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_nf4
from .launching import device, kernels

__all__ = ["nf4_linear"]


def nf4_linear(
    x: Tensor,
    qweight: Tensor,
    absmax: Tensor,
    code: Tensor,
    *,
    blocksize: int,
    out_features: int,
    bias: Tensor | None = None,
    product: Tensor | None = None,
    left: Tensor | None = None,
    left_scale: Tensor | None = None,
    left_multipliers: Tensor | None = None,
) -> Tensor:
    """Compute y = W x + bias + A (B x) in one launch, where W is in bitsandbytes' 4-bit layout.

    `code` decides whether W is NF4 or FP4. The values of the weight (o, d), in row-major order, form blocks of
    `blocksize` values; a block may continue in the next row. Each value is code[q] * absmax of its block.

    The kernel is optimized for 1 to 16 tokens and accepts any number. It sums in float32 and rounds the output once.
    With one token it does not round the weight. With more tokens it rounds the weight to the dtype of x, as a
    dequantized weight would be rounded.

    Args:
        x: inputs, shape (..., d), of any strides, float16, bfloat16 or float32; d is even.
        qweight: o * d / 2 bytes in any shape, uint8. The high four bits of a byte hold the first of its two values.
        absmax: shape (ceil(o * d / blocksize),), float32. With double quantization, pass the dequantized values:
            `dequantize_blockwise(state.absmax, state.state2) + state.offset` of `bitsandbytes.functional`.
        code: the 16 values of the data type, shape (16,), float32: `quant_state.code`.
        blocksize: number of values in a block, a power of two.
        out_features: o.
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

    Source: the layout of Dettmers et al., QLoRA (arXiv 2305.14314), as bitsandbytes stores it.
    """
    check_nf4(x, qweight, absmax, code, blocksize, out_features, bias, product, left, left_scale, left_multipliers)
    output = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    if output.numel():
        with device(x):
            kernels("triton_nf4", x).launch(
                x.reshape(-1, x.shape[-1]),
                qweight,
                absmax,
                code,
                bias,
                None if product is None else product.reshape(-1, product.shape[-1]).contiguous(),
                left,
                left_scale,
                left_multipliers,
                output.view(-1, out_features),
                blocksize=blocksize,
            )
    return output
