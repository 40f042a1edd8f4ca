"""Whole numbers in 4 or 3 bits: blocks of 32 numbers, each a code of few bits times the multiplier of its block.

The multipliers are whole numbers, too. Therefore every number is one that int8 factors can hold as well, is exact in
bfloat16, float16 and float32, and needs no other scale than that of its rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .form import BLOCK

__all__ = ["fits_numbers", "pack_blocks", "round_blocks", "unpack_blocks"]

_FRACTIONS = tuple(part / 20 for part in range(12, 29, 2))  # multipliers to try, as shares of the largest number
_SHIFTS = {4: ((0, 4),), 3: ((0, 2, 4, 6), (0, 1, 2, 3, 4, 5, 6, 7))}  # of the parts of a block's bytes
_WIDTHS = {4: (4,), 3: (2, 1)}  # bits of a code that each part holds, the lowest first


def round_blocks(numbers: Tensor, bits: int) -> Tensor:
    """Round numbers to the nearest ones that `pack_blocks` can hold.

    For each block, several multipliers of both signs are tried, and the one with the least squared error is used. A
    multiplier below the largest number's share clips it, which is often the better choice.

    Args:
        numbers: float, shape (n, width), absolute values at most 127.
        bits: 4 or 3.

    Returns:
        Whole numbers of at most 127, float32, same shape.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    blocks = _blocks(numbers.float())
    peak = blocks.abs().amax(-1, keepdim=True) / -low
    best, least = torch.zeros_like(blocks), blocks.square().sum(-1, keepdim=True)
    for fraction in _FRACTIONS:
        size = (fraction * peak).round().clamp(1, 127 // -low)
        for multiplier in (size, -size):
            found = (blocks / multiplier).round().clamp(low, high) * multiplier
            error = (found - blocks).square().sum(-1, keepdim=True)
            best, least = torch.where(error < least, found, best), torch.minimum(error, least)
    return best.flatten(-2)[:, : numbers.shape[1]]


def pack_blocks(numbers: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Pack numbers that `round_blocks` returned, or multiples of them by a power of two that are at most 127.

    Args:
        numbers: whole numbers, shape (n, width), of any dtype.
        bits: 4 or 3.

    Returns:
        The codes, uint8, shape (n, blocks, 4 * bits), and the multipliers, int8, shape (n, blocks). The last block is
        filled with zeros.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    blocks = _blocks(numbers.to(torch.int32))
    divisor = blocks.abs()
    while divisor.shape[-1] > 1:
        divisor = torch.gcd(*divisor.chunk(2, -1))
    divisor = divisor.clamp(min=1)
    codes = blocks // divisor
    flipped = ((codes < low) | (codes > high)).any(-1, keepdim=True)
    codes = torch.where(flipped, -codes, codes)
    assert bool(((codes >= low) & (codes <= high)).all()), "round the numbers first"
    codes = codes - low
    parts = []
    for shifts, width in zip(_SHIFTS[bits], _WIDTHS[bits], strict=True):
        part = (codes & (2**width - 1)).unflatten(-1, (len(shifts), -1))
        parts.append((part << _column(shifts, codes)).sum(-2))
        codes = codes >> width
    multipliers = torch.where(flipped, -divisor, divisor).squeeze(-1)
    return torch.cat(parts, -1).to(torch.uint8), multipliers.to(torch.int8)


def fits_numbers(codes: Tensor, multipliers: Tensor) -> bool:
    """Whether all numbers of these blocks are at most 127, as those that `pack_blocks` packs; see `unpack_blocks`."""
    plain = unpack_blocks(codes, torch.ones_like(multipliers)).to(torch.int16)
    return bool(((plain * multipliers[..., None]).abs() <= 127).all())


def unpack_blocks(codes: Tensor, multipliers: Tensor) -> Tensor:
    """Return the numbers of each block.

    Args:
        codes, multipliers: what `pack_blocks` returned, or both with the same change of their leading dimensions.

    Returns:
        int8, shape (..., 32), with the leading dimensions of `codes`.
    """
    bits = int(codes.shape[-1]) // 4
    words = codes.view(torch.int32)  # four bytes at once
    found, start, shift = None, 0, 0
    for shifts, width in zip(_SHIFTS[bits], _WIDTHS[bits], strict=True):
        end = start + BLOCK // 4 // len(shifts)
        mask = 0x01010101 * (2**width - 1)
        part = ((words[..., None, start:end] >> _column(shifts, words)) & mask).view(torch.int8).flatten(-2)
        part = part << shift if shift else part
        found, start, shift = part if found is None else found | part, end, shift + width
    assert found is not None
    return (found - 2 ** (bits - 1)) * multipliers[..., None]


def _blocks(numbers: Tensor) -> Tensor:
    return F.pad(numbers, (0, -numbers.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def _column(shifts: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(shifts, dtype=like.dtype, device=like.device)[:, None]
