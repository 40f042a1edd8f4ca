"""The product with the left factor on the GPU, for `left_add_` and for the correction in the quantized products.

Needs triton; only `launching.kernels` and the other modules of triton kernels import this module.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_blocks import numbers

INTERPRETED = triton.knobs.runtime.interpret
"""Whether these kernels run in triton's interpreter. Triton decides that when it decorates them, at import."""

TOKENS = 16  # tokens in a tile: the fewest that tensor cores accept
_OUTPUTS = 32
_RANKS = 64

_DOT_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The triton dtype of the operands of `tl.dot`, for an input of `dtype`."""
    # Triton's interpreter multiplies the bits of bfloat16 numbers as if they were integers.
    return tl.float32 if INTERPRETED and dtype is torch.bfloat16 else _DOT_TYPES[dtype]


def rank_block(rank: int) -> int:
    """Number of ranks in a tile; `tl.dot` needs at least 16."""
    return min(_RANKS, max(16, triton.next_power_of_2(rank)))


@triton.jit
def _entries(left, multipliers, columns, ranks, mask, rank, left_row, left_rank, BITS: tl.constexpr):
    """The entries of `left` at these outputs and ranks without their scales, float32; BITS is 0 for a matrix."""
    if BITS == 0:
        found = tl.load(left + columns * left_row + ranks * left_rank, mask=mask, other=0).to(tl.float32)
    else:
        found = numbers(left, multipliers, columns // 32 * rank + ranks, columns % 32, mask, BITS)
    return found


@triton.jit
def low_rank_vector(
    product,
    left,
    left_scale,
    left_multipliers,
    columns,
    inside,
    rank,
    left_row,
    left_rank,
    BITS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Multiply `product` (r,) by the rows `columns` of `left` (o, r); float32, one value per column."""
    sums = tl.zeros([columns.shape[0], RANKS], tl.float32)
    for start in range(0, rank, RANKS):
        ranks = start + tl.arange(0, RANKS)
        here = ranks < rank
        mask = inside[:, None] & here[None, :]
        factor = _entries(
            left, left_multipliers, columns[:, None], ranks[None, :], mask, rank, left_row, left_rank, BITS
        )
        entries = tl.load(product + ranks, mask=here, other=0)
        sums += factor * entries.to(tl.float32)[None, :]
    total = tl.sum(sums, axis=1)
    if left_scale is not None:
        total *= tl.load(left_scale + columns, mask=inside, other=0)
    return total


@triton.jit
def low_rank_block(
    product,
    left,
    left_scale,
    left_multipliers,
    rows,
    present,
    columns,
    inside,
    rank,
    left_row,
    left_rank,
    BITS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Multiply the tokens `rows` of `product` (T, r) by the rows `columns` of `left` (o, r).

    The result is float32, shape (tokens, columns).
    """
    sums = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for start in range(0, rank, RANKS):
        ranks = start + tl.arange(0, RANKS)
        here = ranks < rank
        mask = here[:, None] & inside[None, :]
        factor = _entries(
            left, left_multipliers, columns[None, :], ranks[:, None], mask, rank, left_row, left_rank, BITS
        )
        entries = tl.load(
            product + rows[:, None] * rank + ranks[None, :],
            mask=present[:, None] & here[None, :],
            other=0,
        )
        # The two dtypes may differ, so both are converted to float32. "ieee" keeps all bits: the default precision
        # would round them to ten bits.
        sums = tl.dot(entries.to(tl.float32), factor, sums, input_precision="ieee")
    if left_scale is not None:
        sums *= tl.load(left_scale + columns, mask=inside, other=0)[None, :]
    return sums


@triton.jit(do_not_specialize=["tokens"])
def _left_add(
    output,
    product,
    left,
    left_scale,
    left_multipliers,
    tokens,
    outputs,
    rank,
    output_token,
    output_column,
    left_row,
    left_rank,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BITS: tl.constexpr,
    RANKS: tl.constexpr,
):
    columns = tl.program_id(1).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = columns < outputs
    if TOKENS == 1:
        total = low_rank_vector(
            product, left, left_scale, left_multipliers, columns, inside, rank, left_row, left_rank, BITS, RANKS
        )
        places = output + columns * output_column
        tl.store(places, tl.load(places, mask=inside, other=0).to(tl.float32) + total, mask=inside)
    else:
        rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        present = rows < tokens
        totals = low_rank_block(
            product,
            left,
            left_scale,
            left_multipliers,
            rows,
            present,
            columns,
            inside,
            rank,
            left_row,
            left_rank,
            BITS,
            RANKS,
        )
        tile = output + rows[:, None] * output_token + columns[None, :] * output_column
        mask = present[:, None] & inside[None, :]
        tl.store(tile, tl.load(tile, mask=mask, other=0).to(tl.float32) + totals, mask=mask)


def bits_of(factor: Tensor | None) -> int:
    """Bits per number of a factor in blocks; 0 for a matrix, or for none."""
    return 0 if factor is None or factor.dim() == 2 else factor.shape[-1] // 4


def launch(
    output: Tensor, product: Tensor, left: Tensor, scale: Tensor | None, multipliers: Tensor | None = None
) -> None:
    """Add `product` (T, r), contiguous, times `left` (o, r) or its blocks to `output` (T, o), of any strides."""
    tokens, outputs = output.shape
    rank = left.shape[1]
    rows = 1 if tokens == 1 else TOKENS
    # Tokens are the first axis, so that blocks of the same outputs run side by side and reuse the cached left factor.
    # Only the first axis of a grid may be long.
    grid = (triton.cdiv(tokens, rows), triton.cdiv(outputs, _OUTPUTS))
    _left_add[grid](
        output,
        product,
        left,
        scale,
        multipliers,
        tokens,
        outputs,
        rank,
        output.stride(0),
        output.stride(1),
        left.stride(0),
        left.stride(1),
        TOKENS=rows,
        OUTPUTS=_OUTPUTS,
        BITS=bits_of(left),
        RANKS=rank_block(rank),
        num_warps=4,
        enable_fp_fusion=True,
    )
