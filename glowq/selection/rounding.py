"""Factors rounded to int8: what that is predicted to cost, and when it is refused.

A byte a value instead of two gives twice the ranks, and rounding must cost less than they gain: the rounded correction
is compared with the same one, unrounded, cut to the bytes that the rounded one takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import RoundingError
from ..factors.int8 import SCALE_BYTES, check_factor_dtype
from .allocation import GroupGains, allocate, by_benefit

__all__ = ["NEGLIGIBLE", "check_rounding", "stored_as"]

NEGLIGIBLE = 0.01
"""Share of what a correction gains, below which nobody minds a difference."""


def stored_as(group_gains: Sequence[GroupGains], factor_dtype: str) -> Sequence[GroupGains]:
    """The same gains, and what a rank takes once factors are stored as `factor_dtype`: in int8 about half the bytes.

    Raises:
        ConfigError: `factor_dtype` is none of `FACTOR_DTYPES`.
    """
    check_factor_dtype(factor_dtype)
    if factor_dtype == "auto":
        return group_gains
    return [
        replace(item, rank_bytes=item.group.in_features + sum(item.group.out_features) + SCALE_BYTES)
        for item in group_gains
    ]


def check_rounding(group_gains: Sequence[GroupGains], found: Sequence[GroupGains]) -> None:
    """Refuse int8 factors that are predicted to gain less than unrounded ones in the same bytes.

    Args:
        group_gains: of the groups, unrounded; where no gain was measured, nothing is predicted.
        found: of the same groups, rounded.

    Raises:
        RoundingError: by more than a hundredth of the whole; the message holds both predictions.
    """
    available = sum(item.rank_bytes * len(item.gains) for item in found)
    unrounded = sum(step.gain for step in allocate(by_benefit(group_gains), available))
    gain, whole = (sum(sum(item.gains) for item in several) for several in (found, group_gains))
    if gain < unrounded - NEGLIGIBLE * whole:
        raise RoundingError(
            f"int8 factors are predicted to keep {gain / whole:.1%} of what these factors gain, and unrounded ones cut "
            f"to the same {available:,} bytes {unrounded / whole:.1%}: rounding loses more than it wins. Leave out "
            "int8, and cut to a budget instead."
        )
