"""How factors are stored: as floats of the model's dtype, or as whole numbers of few bits; and the bytes of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError

__all__ = ["BLOCK", "FACTOR_DTYPES", "FactorForm", "bits_of", "block_bytes", "dtype_name"]

BLOCK = 32
"""Numbers that share one multiplier."""

FACTOR_DTYPES: Mapping[str, int | None] = {"float": None, "int8": 8, "int4": 4, "int3": 3}
"""Names of the forms, and their bits per value; None for "float", the model's own dtype."""

_SCALE_BYTES = 4  # of a rank of whole numbers


@dataclass(frozen=True)
class FactorForm:
    """The form of all factors of a correction.

    Attributes:
        bits: bits per value of whole numbers, see `glowq.factors.integers`; None for floats.
        itemsize: bytes per value of floats.
    """

    bits: int | None
    itemsize: int

    def rank_bytes(self, widths: Sequence[int]) -> int:
        """Bytes of one rank: of a row of the right factor, a column of each left factor, and its scale.

        Args:
            widths: width of the input, and of the output of each member.
        """
        if self.bits is None:
            return self.itemsize * sum(widths)
        if self.bits == 8:
            return sum(widths) + _SCALE_BYTES
        return sum(block_bytes(width, self.bits) for width in widths) + _SCALE_BYTES


def block_bytes(width: int, bits: int) -> int:
    """Bytes of `width` numbers of one rank: their codes, and one byte for the multiplier of each block."""
    return -(-width // BLOCK) * (4 * bits + 1)


def bits_of(factor_dtype: str) -> int | None:
    """The bits per value of a form; None for floats of the model's own dtype.

    Args:
        factor_dtype: one of `FACTOR_DTYPES`; or "auto", which leaves factors as they are.

    Raises:
        ConfigError: the name is neither; the message lists the names.
    """
    known = ("auto", *FACTOR_DTYPES)
    if not isinstance(factor_dtype, str) or factor_dtype not in known:
        raise ConfigError(f"factor_dtype must be one of {', '.join(known)}, found {factor_dtype!r}.")
    return FACTOR_DTYPES.get(factor_dtype)


def dtype_name(bits: int | None) -> str:
    """The name in `FACTOR_DTYPES` of factors with these bits per value."""
    return next(name for name, each in FACTOR_DTYPES.items() if each == bits)
