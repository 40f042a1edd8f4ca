"""Products with GPTQ's packed weight. Needs triton; only `launching.kernels` imports this module.

`_vector` computes one token, in float32, without tensor cores. `_block` computes several tokens, sixteen at a time, on
the tensor cores. Each reads a packed word once for all its tokens.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .triton_left import TOKENS, bits_of, dot_type, low_rank_block, low_rank_vector, rank_block

_COLUMNS = 32  # outputs in a tile: 128 bytes of a row of packed words
_VECTOR_WORDS = 128  # rows of packed words in a tile, eight channels each
_BLOCK_WORDS = 16
_CHANNEL_WORDS = 8  # rows of packed words in a tile where the scale is read for each channel


@triton.jit
def _groups(g_idx, channels, here, GROUP: tl.constexpr):
    """The group of each channel: from `g_idx` if it is given, otherwise runs of GROUP channels (0 for one group)."""
    if g_idx is not None:
        groups = tl.load(g_idx + channels, mask=here, other=0).to(tl.int64)
    elif GROUP == 0:
        groups = channels * 0
    else:
        groups = channels // GROUP
    return groups


@triton.jit
def _scale_and_zero(scales, qzeros, groups, columns, here, outputs, zero_offset):
    """Scale (float32) and zero point (int32) of each group at each column; the two broadcast against each other."""
    scale = tl.load(scales + groups * outputs + columns, mask=here, other=0).to(tl.float32)
    word = tl.load(qzeros + groups * (outputs // 8) + columns // 8, mask=here, other=0)
    zero = ((word >> (columns % 8 * 4).to(tl.int32)) & 0xF) + zero_offset
    return scale, zero


@triton.jit
def _vector(
    x,
    qweight,
    qzeros,
    scales,
    g_idx,
    bias,
    product,
    left,
    left_scale,
    left_multipliers,
    output,
    inputs,
    outputs,
    rank,
    zero_offset,
    x_channel,
    left_row,
    left_rank,
    GROUP: tl.constexpr,
    BY_WORD: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    RANKS: tl.constexpr,
):
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < outputs
    sums = tl.zeros([WORDS, COLUMNS], tl.float32)
    for start in range(0, inputs // 8, WORDS):
        words = start + tl.arange(0, WORDS).to(tl.int64)
        present = words < inputs // 8
        mask = present[:, None] & inside[None, :]
        packed = tl.load(qweight + words[:, None] * outputs + columns[None, :], mask=mask, other=0)
        if BY_WORD:
            # The eight channels of a word share their scale and zero point, which are applied to their sums.
            products = tl.zeros([WORDS, COLUMNS], tl.float32)
            entries = tl.zeros([WORDS], tl.float32)
            for nibble in tl.static_range(8):
                entry = tl.load(x + (words * 8 + nibble) * x_channel, mask=present, other=0).to(tl.float32)
                entries += entry
                products += ((packed >> (4 * nibble)) & 0xF).to(tl.float32) * entry[:, None]
            groups = _groups(g_idx, words * 8, present, GROUP)
            scale, zero = _scale_and_zero(scales, qzeros, groups[:, None], columns[None, :], mask, outputs, zero_offset)
            sums += (products - zero.to(tl.float32) * entries[:, None]) * scale
        else:
            for nibble in tl.static_range(8):
                entry = tl.load(x + (words * 8 + nibble) * x_channel, mask=present, other=0).to(tl.float32)
                groups = _groups(g_idx, words * 8 + nibble, present, GROUP)
                scale, zero = _scale_and_zero(
                    scales, qzeros, groups[:, None], columns[None, :], mask, outputs, zero_offset
                )
                codes = (packed >> (4 * nibble)) & 0xF
                sums += (codes - zero).to(tl.float32) * scale * entry[:, None]
    total = tl.sum(sums, axis=0)
    if bias is not None:
        total += tl.load(bias + columns, mask=inside, other=0).to(tl.float32)
    if left is not None:
        total += low_rank_vector(
            product, left, left_scale, left_multipliers, columns, inside, rank, left_row, left_rank, BITS, RANKS
        )
    tl.store(output + columns, total, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _block(
    x,
    qweight,
    qzeros,
    scales,
    g_idx,
    bias,
    product,
    left,
    left_scale,
    left_multipliers,
    output,
    tokens,
    inputs,
    outputs,
    rank,
    zero_offset,
    x_token,
    x_channel,
    left_row,
    left_rank,
    GROUP: tl.constexpr,
    BY_TILE: tl.constexpr,
    DOT: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    RANKS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    present = rows < tokens
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < outputs
    nibbles = tl.arange(0, 8)
    sums = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for start in tl.range(0, inputs // 8, WORDS, num_stages=3):
        words = start + tl.arange(0, WORDS).to(tl.int64)
        filled = words < inputs // 8
        mask = filled[:, None] & inside[None, :]
        packed = tl.load(qweight + words[:, None] * outputs + columns[None, :], mask=mask, other=0)
        channels = start * 8 + tl.arange(0, WORDS * 8).to(tl.int64)
        here = channels < inputs
        tile = tl.load(
            x + rows[:, None] * x_token + channels[None, :] * x_channel,
            mask=present[:, None] & here[None, :],
            other=0,
        ).to(DOT)
        codes = (packed[:, None, :] >> (nibbles * 4)[None, :, None]) & 0xF
        if BY_TILE:
            # All channels of the tile are in one group. Code minus zero point is a small integer, exact in any dtype,
            # and the scale multiplies the product. So no weight is rounded.
            group = _groups(g_idx, tl.full([1], start, tl.int64) * 8, inside, GROUP)
            scale, zero = _scale_and_zero(scales, qzeros, group, columns, inside, outputs, zero_offset)
            steps = (codes - zero[None, None, :]).to(DOT).reshape(WORDS * 8, COLUMNS)
            sums += tl.dot(tile, steps, input_precision="ieee") * scale[None, :]
        else:
            groups = _groups(g_idx, channels, here, GROUP)
            scale, zero = _scale_and_zero(
                scales,
                qzeros,
                groups[:, None],
                columns[None, :],
                here[:, None] & inside[None, :],
                outputs,
                zero_offset,
            )
            weights = (codes.reshape(WORDS * 8, COLUMNS) - zero).to(tl.float32) * scale
            sums = tl.dot(tile, weights.to(DOT), sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + columns, mask=inside, other=0).to(tl.float32)[None, :]
    if left is not None:
        sums += low_rank_block(
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
    tl.store(
        output + rows[:, None] * outputs + columns[None, :],
        sums,
        mask=present[:, None] & inside[None, :],
    )


def launch(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bias: Tensor | None,
    product: Tensor | None,
    left: Tensor | None,
    left_scale: Tensor | None,
    left_multipliers: Tensor | None,
    output: Tensor,
    *,
    group_size: int,
    zero_offset: int,
) -> None:
    """Write the product of x (T, d), of any strides, and the packed weight (d, o) to output (T, o), contiguous.

    A group size of 0 means one group. `product` (T, r) and every tensor of the packed weight are contiguous.
    """
    tokens, inputs = x.shape
    outputs = qweight.shape[1]
    rank, left_row, left_rank = (0, 0, 0) if left is None else (left.shape[1], left.stride(0), left.stride(1))
    tensors = (x, qweight, qzeros, scales, g_idx, bias, product, left, left_scale, left_multipliers, output)
    columns = triton.cdiv(outputs, _COLUMNS)
    if tokens == 1:
        _vector[(columns,)](
            *tensors,
            inputs,
            outputs,
            rank,
            zero_offset,
            x.stride(1),
            left_row,
            left_rank,
            GROUP=group_size,
            BY_WORD=g_idx is None and group_size % 8 == 0,
            WORDS=_VECTOR_WORDS,
            COLUMNS=_COLUMNS,
            BITS=bits_of(left),
            RANKS=rank_block(rank),
            num_warps=8,
            enable_fp_fusion=True,
        )
        return
    # tl.dot needs at least 16 channels; four words hold 32.
    fitting = [words for words in (_BLOCK_WORDS, _BLOCK_WORDS // 2, 4) if group_size % (8 * words) == 0]
    by_tile = g_idx is None and bool(fitting)
    # Tokens are the first axis, so that blocks of the same columns run side by side and reuse the cached packed words.
    _block[(triton.cdiv(tokens, TOKENS), columns)](
        *tensors,
        tokens,
        inputs,
        outputs,
        rank,
        zero_offset,
        x.stride(0),
        x.stride(1),
        left_row,
        left_rank,
        GROUP=group_size,
        BY_TILE=by_tile,
        DOT=dot_type(x.dtype),
        TOKENS=TOKENS,
        WORDS=fitting[0] if by_tile else _CHANNEL_WORDS,
        COLUMNS=_COLUMNS,
        BITS=bits_of(left),
        RANKS=rank_block(rank),
        num_warps=4,
        enable_fp_fusion=True,
    )
