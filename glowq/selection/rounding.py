"""Predict how much int8 factors lose by rounding, and raise an error if they lose too much.

One byte per value instead of two allows twice the ranks, and rounding must lose less than these ranks gain. Therefore
the rounded correction is compared with the unrounded correction, cut to the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import RoundingError
from ..factors.int8 import SCALE_BYTES, check_factor_dtype
from .allocation import GroupGains, allocate, by_benefit

__all__ = ["NEGLIGIBLE", "check_rounding", "stored_as"]

NEGLIGIBLE = 0.01
"""Largest difference that is ignored, as a share of the gain of a correction."""


def stored_as(group_gains: Sequence[GroupGains], factor_dtype: str) -> Sequence[GroupGains]:
    """Return the same gains with the bytes of a rank of factors stored as `factor_dtype`: in int8 about half of them.

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
    """Raise an error if int8 factors are predicted to gain less than unrounded factors in the same bytes.

    Args:
        group_gains: gains of the groups, unrounded. If no gain was measured, nothing is predicted and nothing raised.
        found: gains of the same groups, rounded.

    Raises:
        RoundingError: the difference is more than a hundredth of the whole gain; the message holds both predictions.
    """
    available = sum(item.rank_bytes * len(item.gains) for item in found)
    unrounded = sum(step.gain for step in allocate(by_benefit(group_gains), available))
    gain, whole = (sum(sum(item.gains) for item in several) for several in (found, group_gains))
    if gain < unrounded - NEGLIGIBLE * whole:
        raise RoundingError(
            f"int8 factors are predicted to keep {gain / whole:.1%} of what these factors gain, and unrounded ones cut "
            f"to the same {available:,} bytes {unrounded / whole:.1%}: rounding loses more than the saved bytes gain. "
            "Leave out int8, and cut to a budget instead."
        )
