"""The left factor on the GPU: a product of tiles that the quantized products end with too, and `left_add_`.

Needs triton: imported by `launching.kernels` alone.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Whether these kernels run in triton's interpreter: settled when triton decorates them, at import."""

TOKENS = 16  # rows of a tile of tokens: the fewest that tensor cores take
_OUTPUTS = 32
_RANKS = 64

_DOT_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The triton dtype that `tl.dot` takes its operands in, for an input of `dtype`."""
    # The interpreter multiplies the bits of bfloat16 numbers as if they were integers.
    return tl.float32 if INTERPRETED and dtype is torch.bfloat16 else _DOT_TYPES[dtype]


def rank_block(rank: int) -> int:
    """Ranks that a tile holds; `tl.dot` takes no fewer than 16."""
    return min(_RANKS, max(16, triton.next_power_of_2(rank)))


@triton.jit
def low_rank_vector(
    product,
    left,
    left_scale,
    columns,
    inside,
    rank,
    left_row,
    left_rank,
    RANKS: tl.constexpr,
):
    """product (r,) times the rows `columns` of left (o, r): float32, one value a column."""
    sums = tl.zeros([columns.shape[0], RANKS], tl.float32)
    for start in range(0, rank, RANKS):
        ranks = start + tl.arange(0, RANKS)
        here = ranks < rank
        factor = tl.load(
            left + columns[:, None] * left_row + ranks[None, :] * left_rank,
            mask=inside[:, None] & here[None, :],
            other=0,
        )
        entries = tl.load(product + ranks, mask=here, other=0)
        sums += factor.to(tl.float32) * entries.to(tl.float32)[None, :]
    total = tl.sum(sums, axis=1)
    if left_scale is not None:
        total *= tl.load(left_scale + columns, mask=inside, other=0)
    return total


@triton.jit
def low_rank_block(
    product,
    left,
    left_scale,
    rows,
    present,
    columns,
    inside,
    rank,
    left_row,
    left_rank,
    RANKS: tl.constexpr,
):
    """The tokens `rows` of product (T, r) times the rows `columns` of left (o, r): float32, (tokens, columns)."""
    sums = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for start in range(0, rank, RANKS):
        ranks = start + tl.arange(0, RANKS)
        here = ranks < rank
        factor = tl.load(
            left + columns[None, :] * left_row + ranks[:, None] * left_rank,
            mask=here[:, None] & inside[None, :],
            other=0,
        )
        entries = tl.load(
            product + rows[:, None] * rank + ranks[None, :],
            mask=present[:, None] & here[None, :],
            other=0,
        )
        # Factors of any two dtypes meet in float32; "ieee", because the default would round them to ten bits.
        sums = tl.dot(entries.to(tl.float32), factor.to(tl.float32), sums, input_precision="ieee")
    if left_scale is not None:
        sums *= tl.load(left_scale + columns, mask=inside, other=0)[None, :]
    return sums


@triton.jit(do_not_specialize=["tokens"])
def _left_add(
    output,
    product,
    left,
    left_scale,
    tokens,
    outputs,
    rank,
    output_token,
    output_column,
    left_row,
    left_rank,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    columns = tl.program_id(1).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = columns < outputs
    if TOKENS == 1:
        total = low_rank_vector(product, left, left_scale, columns, inside, rank, left_row, left_rank, RANKS)
        places = output + columns * output_column
        tl.store(places, tl.load(places, mask=inside, other=0).to(tl.float32) + total, mask=inside)
    else:
        rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        present = rows < tokens
        totals = low_rank_block(
            product, left, left_scale, rows, present, columns, inside, rank, left_row, left_rank, RANKS
        )
        tile = output + rows[:, None] * output_token + columns[None, :] * output_column
        mask = present[:, None] & inside[None, :]
        tl.store(tile, tl.load(tile, mask=mask, other=0).to(tl.float32) + totals, mask=mask)


def launch(output: Tensor, product: Tensor, left: Tensor, scale: Tensor | None) -> None:
    """Add product (T, r), contiguous, times left (o, r) to output (T, o), whatever its strides."""
    tokens, outputs = output.shape
    rank = left.shape[1]
    rows = 1 if tokens == 1 else TOKENS
    # Blocks of the same outputs are neighbours on the first axis, so that they find the left factor in the cache; that
    # axis is also the one that may be long.
    grid = (triton.cdiv(tokens, rows), triton.cdiv(outputs, _OUTPUTS))
    _left_add[grid](
        output,
        product,
        left,
        scale,
        tokens,
        outputs,
        rank,
        output.stride(0),
        output.stride(1),
        left.stride(0),
        left.stride(1),
        TOKENS=rows,
        OUTPUTS=_OUTPUTS,
        RANKS=rank_block(rank),
        num_warps=4,
        enable_fp_fusion=True,
    )
