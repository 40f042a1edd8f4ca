"""Factors as whole numbers of few bits: the grid that they are rounded to, and the form in which they are stored.

A rank is one row of the right factor and one column of every left factor. The row holds whole numbers up to 127 times
the scale of the rank, a power of two. The columns hold whole numbers up to 127 in units of 1/128. Therefore a rank has
only one scale, and ranks can be cut off as in any other correction. Every value is exact in bfloat16, float16 and
float32, so that programs that read floats get the same factors.

With 8 bits, each number is stored as it is. With 4 or 3 bits, blocks of 32 numbers of one rank share a multiplier, see
`glowq.factors.blocks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import pack_blocks, round_blocks, unpack_blocks

__all__ = [
    "LEFT_UNIT",
    "Packed",
    "Stored",
    "in_bytes",
    "numbers_of_left",
    "numbers_of_right",
    "pack",
    "round_factors",
    "unpack",
]

LEFT_UNIT = 2.0**-7
"""Unit of the whole numbers in a left factor."""

_LARGEST = {8: 127, 4: 120, 3: 124}  # largest number for each count of bits: the lowest code times the most it can be
_LEAST_SCALE = 2.0**-24  # smallest scale whose multiples up to 127 are all exact in float16


class Stored(NamedTuple):
    """One factor as it is stored.

    Attributes:
        values: a matrix of any float dtype, or of int8; for 4 or 3 bits the codes of `glowq.factors.blocks`, uint8,
            shape (r, blocks of d, 4 * bits) for a right factor and (blocks of o, r, 4 * bits) for a left one.
        multipliers: for 4 or 3 bits the multiplier of each block, int8, the shape of `values` without its last
            dimension; None for other factors.
    """

    values: Tensor
    multipliers: Tensor | None = None


class Packed(NamedTuple):
    """A group's factors as whole numbers.

    Attributes:
        right: the right factor.
        scale: scale of each row of the right factor, shape (r,), float32, powers of two.
        lefts: member name -> left factor, in units of `LEFT_UNIT`.
    """

    right: Stored
    scale: Tensor
    lefts: dict[str, Stored]


def round_factors(right: Tensor, lefts: Mapping[str, Tensor], bits: int = 8) -> tuple[Tensor, dict[str, Tensor]]:
    """Round factors to the grid that `pack` requires.

    Args:
        right: right factor B, shape (r, d), float.
        lefts: member name -> left factor A_i, shape (o_i, r), dtype of `right`.
        bits: 8, 4 or 3.

    Returns:
        (right, lefts) with the same product A B up to rounding, in the same shapes and dtype. Before they are rounded,
        the largest value of a row of B is the largest number of the grid times the scale. The largest value of a
        column, over all members, is at least half of the largest number, or less if the scale is the smallest one.
    """
    rows = right.float()
    columns = {member: left.float() for member, left in lefts.items()}
    most = torch.stack([left.abs().amax(0) for left in columns.values()]).amax(0)
    tallest = rows.abs().amax(1)
    empty = (most == 0) | (tallest == 0)
    # The columns use the full range of their grid, times `shrunk`, because the row's scale must be a power of two.
    largest = _LARGEST[bits]
    full = torch.where(empty, 1.0, most / (largest * LEFT_UNIT))
    wanted = torch.where(empty, 1.0, tallest * full / largest)
    scale = torch.exp2(torch.ceil(torch.log2(wanted))).clamp(min=_LEAST_SCALE)
    codes = _rounded(rows * full[:, None] / wanted[:, None], bits).clamp(-largest, largest)
    shrunk = wanted / scale  # 1/2 to 1; less if the scale is the smallest one
    found = {}
    for member, left in columns.items():
        values = _rounded((left / full * shrunk / LEFT_UNIT).T, bits).T * LEFT_UNIT
        found[member] = torch.where(empty, 0.0, values).to(lefts[member].dtype)
    return torch.where(empty[:, None], 0.0, codes * scale[:, None]).to(right.dtype), found


def pack(right: Tensor, lefts: Mapping[str, Tensor], bits: int = 8) -> Packed:
    """Convert factors that `round_factors` returned, or the first ranks of them, to whole numbers.

    Args:
        right: shape (r, d), float.
        lefts: member name -> shape (o_i, r), float.
        bits: what they were rounded to.
    """
    rows = right.float()
    scale = torch.exp2(torch.ceil(torch.log2((rows.abs().amax(1) / 127).clamp(min=_LEAST_SCALE))))
    numbers = (rows / scale[:, None]).round()
    others = {member: (left.float() / LEFT_UNIT).round() for member, left in lefts.items()}
    if bits == 8:
        wholes = {member: Stored(left.to(torch.int8)) for member, left in others.items()}
        return Packed(Stored(numbers.to(torch.int8)), scale, wholes)
    blocks = {}
    for member, left in others.items():
        codes, multipliers = pack_blocks(left.T, bits)
        blocks[member] = Stored(codes.transpose(0, 1).contiguous(), multipliers.T.contiguous())
    return Packed(Stored(*pack_blocks(numbers, bits)), scale, blocks)


def in_bytes(packed: Packed, shapes: Mapping[str, tuple[int, int]], multiple: int) -> Packed:
    """The same numbers as int8 matrices, whatever their bits, for products on the CPU.

    Args:
        packed: the factors as whole numbers.
        shapes: member name -> (o_i, d), see `Group.shapes`.
        multiple: ranks of zeros are appended up to a multiple of this, because such a product reads that many at once.
    """
    more = -len(packed.scale) % multiple
    lefts = {member: numbers_of_left(left, shapes[member][0]) for member, left in packed.lefts.items()}
    return Packed(
        Stored(F.pad(numbers_of_right(packed.right, _width(shapes)), (0, 0, 0, more))),
        F.pad(packed.scale, (0, more), value=1.0),
        {member: Stored(F.pad(left, (0, more))) for member, left in lefts.items()},
    )


def unpack(
    packed: Packed, dtype: torch.dtype, shapes: Mapping[str, tuple[int, int]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the factors as floats: right, shape (r, d), and member name -> left, shape (o_i, r).

    Args:
        packed: the factors as whole numbers.
        dtype: dtype of the floats.
        shapes: member name -> (o_i, d), see `Group.shapes`.
    """
    right = numbers_of_right(packed.right, _width(shapes)).to(dtype) * packed.scale.to(dtype)[:, None]
    numbers = {member: numbers_of_left(left, shapes[member][0]) for member, left in packed.lefts.items()}
    return right, {member: left.to(dtype) * LEFT_UNIT for member, left in numbers.items()}


def numbers_of_right(stored: Stored, width: int) -> Tensor:
    """The whole numbers of a right factor, int8, shape (r, width)."""
    if stored.multipliers is None:
        return stored.values
    return unpack_blocks(stored.values, stored.multipliers).flatten(-2)[:, :width]


def numbers_of_left(stored: Stored, width: int) -> Tensor:
    """The whole numbers of a left factor, int8, shape (width, r)."""
    if stored.multipliers is None:
        return stored.values
    return unpack_blocks(stored.values, stored.multipliers).transpose(1, 2).flatten(0, 1)[:width]


def _width(shapes: Mapping[str, tuple[int, int]]) -> int:
    return next(width for _, width in shapes.values())


def _rounded(numbers: Tensor, bits: int) -> Tensor:
    return numbers.round() if bits == 8 else round_blocks(numbers, bits)
