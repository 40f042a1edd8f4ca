"""Predict how much factors of few bits lose by rounding, and raise an error if they lose too much.

One byte per value instead of two allows twice the ranks, and 4 or 3 bits about four times as many. Rounding must lose
less than these ranks gain. Therefore
the rounded correction is compared with the unrounded correction, cut to the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import RoundingError
from ..factors.form import FactorForm, bits_of
from .allocation import GroupGains, allocate, by_benefit

__all__ = ["NEGLIGIBLE", "check_rounding", "stored_as"]

NEGLIGIBLE = 0.01
"""Largest difference that is ignored, as a share of the gain of a correction."""


def stored_as(group_gains: Sequence[GroupGains], factor_dtype: str) -> Sequence[GroupGains]:
    """Return the same gains with the bytes of a rank of factors stored as `factor_dtype`: of int8 about half.

    Raises:
        ConfigError: `factor_dtype` is none of `FACTOR_DTYPES`.
    """
    bits = bits_of(factor_dtype)
    if bits is None:
        return group_gains
    form = FactorForm(bits, 0)
    return [replace(item, rank_bytes=form.rank_bytes(item.group.widths)) for item in group_gains]


def check_rounding(group_gains: Sequence[GroupGains], found: Sequence[GroupGains], factor_dtype: str) -> None:
    """Raise an error if rounded factors are predicted to gain less than unrounded factors in the same bytes.

    Args:
        group_gains: gains of the groups, unrounded. If no gain was measured, nothing is predicted and nothing raised.
        found: gains of the same groups, rounded.
        factor_dtype: what they were rounded to.

    Raises:
        RoundingError: the difference is more than a hundredth of the whole gain; the message holds both predictions.
    """
    available = sum(item.rank_bytes * len(item.gains) for item in found)
    unrounded = sum(step.gain for step in allocate(by_benefit(group_gains), available))
    gain, whole = (sum(sum(item.gains) for item in several) for several in (found, group_gains))
    if gain < unrounded - NEGLIGIBLE * whole:
        raise RoundingError(
            f"{factor_dtype} factors are predicted to keep {gain / whole:.1%} of what these factors gain, and "
            f"unrounded ones cut to the same {available:,} bytes {unrounded / whole:.1%}: rounding loses more than "
            f"the saved bytes gain. Factors in float, cut to a budget, lose less."
        )
