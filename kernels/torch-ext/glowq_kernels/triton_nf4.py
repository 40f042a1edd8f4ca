"""Products with bitsandbytes' 4-bit weight. Needs triton; only `launching.kernels` imports this module.

As for GPTQ, `_vector` computes one token and `_block` computes several. Both read the rows of the weight in chunks of
bytes. A chunk never crosses the border of a quantization block, so that all its values have the same absmax.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .triton_left import TOKENS, bits_of, dot_type, low_rank_block, low_rank_vector, rank_block

_CHUNK = 32  # maximum bytes in a chunk: 64 values, the smallest block size in use
_VECTOR_COLUMNS = 8
_VECTOR_BYTES = 1024  # bytes in one column of a tile
_BLOCK_COLUMNS = 32
_BLOCK_BYTES = 64


@triton.jit
def _vector(
    x,
    qweight,
    absmax,
    code,
    bias,
    product,
    left,
    left_scale,
    left_multipliers,
    output,
    inputs,
    outputs,
    rank,
    x_channel,
    left_row,
    left_rank,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    RANKS: tl.constexpr,
):
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < outputs
    first = columns * (inputs // 2)
    sums = tl.zeros([COLUMNS, CHUNKS], tl.float32)
    for start in range(0, inputs // 2 // CHUNK, CHUNKS):
        chunks = start + tl.arange(0, CHUNKS).to(tl.int64)
        present = chunks < inputs // 2 // CHUNK
        places = chunks[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        pairs = places[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
        entries = tl.load(x + pairs * x_channel, mask=present[:, None, None], other=0).to(tl.float32)
        even, odd = tl.split(entries)
        mask = inside[:, None] & present[None, :]
        packed = tl.load(qweight + first[:, None, None] + places[None, :, :], mask=mask[:, :, None], other=0)
        packed = packed.to(tl.int32)
        products = tl.load(code + (packed >> 4)) * even[None, :, :] + tl.load(code + (packed & 0xF)) * odd[None, :, :]
        blocks = (first[:, None] + chunks[None, :] * CHUNK) * 2 // BLOCK
        sums += tl.sum(products, axis=2) * tl.load(absmax + blocks, mask=mask, other=0)
    total = tl.sum(sums, axis=1)
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
    absmax,
    code,
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
    x_token,
    x_channel,
    left_row,
    left_rank,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    RANKS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    filled = rows < tokens
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < outputs
    first = columns * (inputs // 2)
    sums = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for start in tl.range(0, inputs // 2 // CHUNK, CHUNKS, num_stages=3):
        channels = start * (2 * CHUNK) + tl.arange(0, CHUNKS * CHUNK * 2).to(tl.int64)
        tile = tl.load(
            x + rows[:, None] * x_token + channels[None, :] * x_channel,
            mask=filled[:, None] & (channels < inputs)[None, :],
            other=0,
        ).to(DOT)
        chunks = start + tl.arange(0, CHUNKS).to(tl.int64)
        mask = inside[:, None] & (chunks < inputs // 2 // CHUNK)[None, :]
        places = chunks[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        packed = tl.load(qweight + first[:, None, None] + places[None, :, :], mask=mask[:, :, None], other=0)
        packed = packed.to(tl.int32)
        blocks = (first[:, None] + chunks[None, :] * CHUNK) * 2 // BLOCK
        scale = tl.load(absmax + blocks, mask=mask, other=0)[:, :, None]
        high = (tl.load(code + (packed >> 4)) * scale).to(DOT)
        low = (tl.load(code + (packed & 0xF)) * scale).to(DOT)
        weights = tl.join(high, low).reshape(COLUMNS, CHUNKS * CHUNK * 2)
        sums = tl.dot(tile, tl.trans(weights), sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + columns, mask=inside, other=0).to(tl.float32)[None, :]
    if left is not None:
        sums += low_rank_block(
            product,
            left,
            left_scale,
            left_multipliers,
            rows,
            filled,
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
        mask=filled[:, None] & inside[None, :],
    )


def launch(
    x: Tensor,
    qweight: Tensor,
    absmax: Tensor,
    code: Tensor,
    bias: Tensor | None,
    product: Tensor | None,
    left: Tensor | None,
    left_scale: Tensor | None,
    left_multipliers: Tensor | None,
    output: Tensor,
    *,
    blocksize: int,
) -> None:
    """Write the product of x (T, d), of any strides, and the packed weight (o, d) to output (T, o), contiguous.

    `product` (T, r) and every tensor of the packed weight are contiguous.
    """
    tokens, inputs = x.shape
    outputs = output.shape[1]
    rank, left_row, left_rank = (0, 0, 0) if left is None else (left.shape[1], left.stride(0), left.stride(1))
    tensors = (x, qweight, absmax, code, bias, product, left, left_scale, left_multipliers, output)
    chunk = math.gcd(inputs, blocksize, 2 * _CHUNK) // 2
    if tokens == 1:
        _vector[(triton.cdiv(outputs, _VECTOR_COLUMNS),)](
            *tensors,
            inputs,
            outputs,
            rank,
            x.stride(1),
            left_row,
            left_rank,
            BLOCK=blocksize,
            CHUNK=chunk,
            CHUNKS=_VECTOR_BYTES // chunk,
            COLUMNS=_VECTOR_COLUMNS,
            BITS=bits_of(left),
            RANKS=rank_block(rank),
            num_warps=8,
            enable_fp_fusion=True,
        )
        return
    _block[(triton.cdiv(tokens, TOKENS), triton.cdiv(outputs, _BLOCK_COLUMNS))](
        *tensors,
        tokens,
        inputs,
        outputs,
        rank,
        x.stride(0),
        x.stride(1),
        left_row,
        left_rank,
        BLOCK=blocksize,
        DOT=dot_type(x.dtype),
        CHUNK=chunk,
        CHUNKS=_BLOCK_BYTES // chunk,
        TOKENS=TOKENS,
        COLUMNS=_BLOCK_COLUMNS,
        BITS=bits_of(left),
        RANKS=rank_block(rank),
        num_warps=4,
        enable_fp_fusion=True,
    )
