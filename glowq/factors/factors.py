"""`GroupFactors`: the low-rank factors of one group, which can be cut to their first ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from .form import FactorForm
from .group import Group

__all__ = ["GroupFactors", "cut_group"]


def cut_group(entry: GroupFactors, rank: int) -> GroupFactors:
    """Return the first `rank` ranks of a group's factors, or all of them if there are fewer."""
    lefts = {member: left[:, :rank].contiguous() for member, left in entry.lefts.items()}
    return replace(entry, right=entry.right[:rank].contiguous(), lefts=lefts, gains=entry.gains[:rank])


@dataclass(frozen=True)
class GroupFactors:
    """One group and its factors.

    Attributes:
        group: the group.
        right: right factor B, shape (r, d).
        lefts: member name -> left factor A_i, shape (o_i, r).
        gains: error that each rank removes, shape (r,), float64, descending, in one unit for the whole correction.
        total: error of the group without a correction, in the same unit.
        bits: 8, 4 or 3 if the factors are stored and used as whole numbers of so many bits. Their values are then on
            the grid of `glowq.factors.integers`. None for floats.
    """

    group: Group
    right: Tensor
    lefts: Mapping[str, Tensor]
    gains: Tensor
    total: float
    bits: int | None = None

    @property
    def rank(self) -> int:
        """Rank r of the group."""
        return self.right.shape[0]

    @property
    def factor_bytes(self) -> int:
        """Bytes of all factors, without the zeros that fill int8 factors to multiples of 16 ranks on the CPU."""
        if self.bits is not None:
            return self.rank * FactorForm(self.bits, 0).rank_bytes(self.group.widths)
        factors = (self.right, *self.lefts.values())
        return sum(factor.numel() * factor.element_size() for factor in factors)
