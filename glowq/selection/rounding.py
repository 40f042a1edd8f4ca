"""Factors rounded to int8: what that is predicted to cost, and when it is refused.

A byte a value instead of two buys twice the ranks. What rounding takes must be less than that: the yardstick is the
same correction, unrounded, cut to the bytes that the rounded one takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import RoundingError
from ..factors.int8 import SCALE_BYTES, check_factor_dtype
from .allocation import Offer, allocate, by_benefit

__all__ = ["NEGLIGIBLE", "check_rounding", "priced"]

NEGLIGIBLE = 0.01
"""Share of what a correction gains, below which nobody minds a difference."""


def priced(offers: Sequence[Offer], factor_dtype: str) -> Sequence[Offer]:
    """What groups have to sell once their factors are stored as `factor_dtype`: in int8 a rank is about half as dear.

    Raises:
        ConfigError: `factor_dtype` is none of `FACTOR_DTYPES`.
    """
    check_factor_dtype(factor_dtype)
    if factor_dtype == "auto":
        return offers
    return [
        replace(offer, rank_bytes=offer.group.in_features + sum(offer.group.out_features) + SCALE_BYTES)
        for offer in offers
    ]


def check_rounding(offers: Sequence[Offer], found: Sequence[Offer]) -> None:
    """Refuse int8 factors that are predicted to gain less than unrounded ones in the same bytes.

    Args:
        offers: of the groups, unrounded; where no gain was measured, nothing is predicted.
        found: of the same groups, rounded.

    Raises:
        RoundingError: by more than a hundredth of the whole; the message holds both predictions.
    """
    available = sum(offer.rank_bytes * len(offer.gains) for offer in found)
    unrounded = sum(step.gain for step in allocate(by_benefit(offers), available))
    gain, whole = (sum(sum(offer.gains) for offer in several) for several in (found, offers))
    if gain < unrounded - NEGLIGIBLE * whole:
        raise RoundingError(
            f"int8 factors are predicted to keep {gain / whole:.1%} of what these factors gain, and unrounded ones cut "
            f"to the same {available:,} bytes {unrounded / whole:.1%}: rounding loses more than it wins. Leave out "
            "int8, and cut to a budget instead."
        )
