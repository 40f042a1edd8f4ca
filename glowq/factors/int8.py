"""Factors that take a byte a value: the grid that they are rounded to, and their int8 form, which loses nothing more.

A rank is one row of the right factor and one column of every left factor. Its size is put into the row, as a power of
two times whole numbers up to 127; the columns are whole numbers up to 127 in units of 1/128. So a rank has one scale,
ranks can be cut off as in any other correction, and every value is exactly a value of bfloat16, float16 and float32:
the rounded factors mean the same to every program that reads floats.
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
"""What a left factor's whole numbers count in."""

SCALE_BYTES = 4
"""Bytes of a rank's scale."""

_LARGEST = 127
_LEAST_SCALE = 2.0**-24  # of which float16 still holds every multiple up to 127


class Packed(NamedTuple):
    """A group's factors in int8.

    Attributes:
        right: shape (r, d), int8.
        scale: of each row of `right`, shape (r,), float32, powers of two.
        lefts: member name -> shape (o_i, r), int8, in units of `LEFT_UNIT`.
    """

    right: Tensor
    scale: Tensor
    lefts: dict[str, Tensor]


def round_factors(right: Tensor, lefts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The nearest factors that `pack` takes.

    Args:
        right: right factor B, shape (r, d), float.
        lefts: member name -> left factor A_i, shape (o_i, r), dtype of `right`.

    Returns:
        The same product A B up to rounding, in the same shapes and dtype: the largest value of a row of B is 64 to 127
        times a power of two, the largest of a column of A about one.
    """
    rows = right.float()
    columns = {member: left.float() for member, left in lefts.items()}
    most = torch.stack([left.abs().amax(0) for left in columns.values()]).amax(0)
    tallest = rows.abs().amax(1)
    empty = (most == 0) | (tallest == 0)
    # The column is made as large as its grid is, and a little less where the row's scale has to be a power of two.
    full = torch.where(empty, 1.0, most / (_LARGEST * LEFT_UNIT))
    wanted = torch.where(empty, 1.0, tallest * full / _LARGEST)
    scale = torch.exp2(torch.ceil(torch.log2(wanted))).clamp(min=_LEAST_SCALE)
    codes = (rows * full[:, None] / wanted[:, None]).round().clamp(-_LARGEST, _LARGEST)
    shrunk = wanted / scale  # 1/2 to 1; less where the scale is the least there is
    found = {}
    for member, left in columns.items():
        values = (left / full * shrunk / LEFT_UNIT).round() * LEFT_UNIT
        found[member] = torch.where(empty, 0.0, values).to(lefts[member].dtype)
    return torch.where(empty[:, None], 0.0, codes * scale[:, None]).to(right.dtype), found


def pack(right: Tensor, lefts: Mapping[str, Tensor]) -> Packed:
    """Factors that `round_factors` returned, or the first ranks of such, as int8.

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
    """The same with ranks of zeros, up to a multiple: a product on the CPU reads whole multiples of them at once."""
    more = -len(packed.scale) % multiple
    return Packed(
        F.pad(packed.right, (0, 0, 0, more)),
        F.pad(packed.scale, (0, more), value=1.0),
        {member: F.pad(left, (0, more)) for member, left in packed.lefts.items()},
    )


def unpack(packed: Packed, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """The factors as floats: right (r, d), and member name -> left (o_i, r)."""
    right = packed.right.to(dtype) * packed.scale.to(dtype)[:, None]
    return right, {member: left.to(dtype) * LEFT_UNIT for member, left in packed.lefts.items()}


FACTOR_DTYPES = ("auto", "int8")
"""What factors can be stored in: the model's own dtype, or a byte a value."""


def check_factor_dtype(factor_dtype: str) -> None:
    """Refuse what is none of `FACTOR_DTYPES`.

    Raises:
        ConfigError: naming what there is.
    """
    if factor_dtype not in FACTOR_DTYPES:
        raise ConfigError(f"factor_dtype must be one of {', '.join(FACTOR_DTYPES)}, found {factor_dtype!r}.")
