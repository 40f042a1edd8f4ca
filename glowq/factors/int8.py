"""Factors with one byte per value: the grid that they are rounded to, and their int8 form, which adds no more error.

A rank is one row of the right factor and one column of every left factor. The row holds whole numbers up to 127 times
the scale of the rank, a power of two. The columns hold whole numbers up to 127 in units of 1/128. Therefore a rank has
only one scale, and ranks can be cut off as in any other correction. Every value is exact in bfloat16, float16 and
float32, so that programs that read floats get the same factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError

__all__ = [
    "FACTOR_DTYPES",
    "LEFT_UNIT",
    "SCALE_BYTES",
    "Packed",
    "check_factor_dtype",
    "filled",
    "pack",
    "round_factors",
    "unpack",
]

LEFT_UNIT = 2.0**-7
"""Unit of the whole numbers in a left factor."""

SCALE_BYTES = 4
"""Bytes of a rank's scale."""

_LARGEST = 127
_LEAST_SCALE = 2.0**-24  # smallest scale whose multiples up to 127 are all exact in float16


class Packed(NamedTuple):
    """A group's factors in int8.

    Attributes:
        right: shape (r, d), int8.
        scale: scale of each row of `right`, shape (r,), float32, powers of two.
        lefts: member name -> shape (o_i, r), int8, in units of `LEFT_UNIT`.
    """

    right: Tensor
    scale: Tensor
    lefts: dict[str, Tensor]


def round_factors(right: Tensor, lefts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Round factors to the grid that `pack` requires.

    Args:
        right: right factor B, shape (r, d), float.
        lefts: member name -> left factor A_i, shape (o_i, r), dtype of `right`.

    Returns:
        (right, lefts) with the same product A B up to rounding, in the same shapes and dtype. The largest value of a
        row of B is 127 times its scale. The largest value of a column, over all members, is 64/128 to 127/128, or less
        if the scale is the smallest one.
    """
    rows = right.float()
    columns = {member: left.float() for member, left in lefts.items()}
    most = torch.stack([left.abs().amax(0) for left in columns.values()]).amax(0)
    tallest = rows.abs().amax(1)
    empty = (most == 0) | (tallest == 0)
    # The columns use the full range of their grid, times `shrunk`, because the row's scale must be a power of two.
    full = torch.where(empty, 1.0, most / (_LARGEST * LEFT_UNIT))
    wanted = torch.where(empty, 1.0, tallest * full / _LARGEST)
    scale = torch.exp2(torch.ceil(torch.log2(wanted))).clamp(min=_LEAST_SCALE)
    codes = (rows * full[:, None] / wanted[:, None]).round().clamp(-_LARGEST, _LARGEST)
    shrunk = wanted / scale  # 1/2 to 1; less if the scale is the smallest one
    found = {}
    for member, left in columns.items():
        values = (left / full * shrunk / LEFT_UNIT).round() * LEFT_UNIT
        found[member] = torch.where(empty, 0.0, values).to(lefts[member].dtype)
    return torch.where(empty[:, None], 0.0, codes * scale[:, None]).to(right.dtype), found


def pack(right: Tensor, lefts: Mapping[str, Tensor]) -> Packed:
    """Convert factors that `round_factors` returned, or the first ranks of them, to int8.

    Args:
        right: shape (r, d), float.
        lefts: member name -> shape (o_i, r), float.
    """
    rows = right.float()
    scale = torch.exp2(torch.ceil(torch.log2((rows.abs().amax(1) / _LARGEST).clamp(min=_LEAST_SCALE))))
    return Packed(
        (rows / scale[:, None]).round().to(torch.int8),
        scale,
        {member: (left.float() / LEFT_UNIT).round().to(torch.int8) for member, left in lefts.items()},
    )


def filled(packed: Packed, multiple: int) -> Packed:
    """Append ranks of zeros up to a multiple of `multiple`, because a product on the CPU reads that many at once."""
    more = -len(packed.scale) % multiple
    return Packed(
        F.pad(packed.right, (0, 0, 0, more)),
        F.pad(packed.scale, (0, more), value=1.0),
        {member: F.pad(left, (0, more)) for member, left in packed.lefts.items()},
    )


def unpack(packed: Packed, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the factors as floats: right, shape (r, d), and member name -> left, shape (o_i, r)."""
    right = packed.right.to(dtype) * packed.scale.to(dtype)[:, None]
    return right, {member: left.to(dtype) * LEFT_UNIT for member, left in packed.lefts.items()}


FACTOR_DTYPES = ("auto", "int8")
"""How factors can be stored: in the model's own dtype ("auto"), or in one byte per value ("int8")."""


def check_factor_dtype(factor_dtype: str) -> None:
    """Raise an error unless `factor_dtype` is one of `FACTOR_DTYPES`.

    Raises:
        ConfigError: it is not; the message lists them.
    """
    if factor_dtype not in FACTOR_DTYPES:
        raise ConfigError(f"factor_dtype must be one of {', '.join(FACTOR_DTYPES)}, found {factor_dtype!r}.")
