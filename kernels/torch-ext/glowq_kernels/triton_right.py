"""The product with the right factor on the GPU. Needs triton; only `launching.kernels` imports this module."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .triton_blocks import numbers
from .triton_left import bits_of

_TOKENS = 4
_PRODUCTS = 4096  # products in a tile: 16 per thread


@triton.jit(do_not_specialize=["tokens"])
def _right(
    x,
    right,
    scale,
    multipliers,
    output,
    tokens,
    inputs,
    rank,
    x_token,
    x_channel,
    right_row,
    right_channel,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    present = rows < tokens
    sums = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for start in range(0, inputs, CHANNELS):
        channels = start + tl.arange(0, CHANNELS).to(tl.int64)
        here = channels < inputs
        if BITS == 0:
            factor = tl.load(right + row * right_row + channels * right_channel, mask=here, other=0).to(tl.float32)
        else:
            places = row * ((inputs + 31) // 32) + channels // 32
            factor = numbers(right, multipliers, places, channels % 32, here, BITS)
        tile = tl.load(
            x + rows[:, None] * x_token + channels[None, :] * x_channel,
            mask=present[:, None] & here[None, :],
            other=0,
        )
        sums += tile.to(tl.float32) * factor[None, :]
    # Each thread has summed its own channels. This adds the sums of the threads, always in the same order.
    total = tl.sum(sums, axis=1)
    if scale is not None:
        total *= tl.load(scale + row)
    tl.store(output + rows * rank + row, total, mask=present)


def launch(x: Tensor, right: Tensor, scale: Tensor | None, multipliers: Tensor | None, output: Tensor) -> None:
    """Write x (T, d) times `right` (r, d), both of any strides, or its blocks, to `output` (T, r), contiguous."""
    tokens, inputs = x.shape
    rank = right.shape[0]
    rows = min(_TOKENS, triton.next_power_of_2(tokens))
    # Each program takes one row of the right factor, so that a small rank still fills the GPU. Programs for more
    # tokens reuse the cached row.
    _right[(triton.cdiv(tokens, rows), rank)](
        x,
        right,
        scale,
        multipliers,
        output,
        tokens,
        inputs,
        rank,
        x.stride(0),
        x.stride(1),
        right.stride(0),
        right.stride(1),
        BITS=bits_of(right),
        TOKENS=rows,
        CHANNELS=min(_PRODUCTS // rows, max(32, triton.next_power_of_2(inputs))),
        num_warps=8,
        enable_fp_fusion=True,
    )
