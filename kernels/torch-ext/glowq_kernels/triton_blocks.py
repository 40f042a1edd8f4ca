"""Factors in blocks of 4 or 3 bits, read by the kernels of both products. Needs triton.

A block holds 32 numbers of one rank: a code of each in 4 * bits bytes, and the multiplier of the block, int8. A number
is its code, less 8 or 4, times the multiplier. With 4 bits, byte i holds the codes i and i + 16, the first in the low
bits. With 3 bits, byte i of the first 8 holds the two low bits of the codes i, i + 8, i + 16 and i + 24, and byte i of
the last 4 holds the highest bits of the codes i, i + 4, ..., i + 28.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def numbers(codes, multipliers, places, index, mask, BITS: tl.constexpr):
    """The numbers at `index` (0 to 31) of the blocks `places`, float32; 0 outside of the mask."""
    start = codes + places * (4 * BITS)
    index = index.to(tl.int32)
    if BITS == 4:
        found = tl.load(start + index % 16, mask=mask, other=0).to(tl.int32)
        found = ((found >> (index // 16 * 4)) & 15) - 8
    else:
        low = tl.load(start + index % 8, mask=mask, other=0).to(tl.int32)
        high = tl.load(start + 8 + index % 4, mask=mask, other=0).to(tl.int32)
        found = ((low >> (index // 8 * 2)) & 3) + ((high >> (index // 4)) & 1) * 4 - 4
    return found.to(tl.float32) * tl.load(multipliers + places, mask=mask, other=0).to(tl.float32)
