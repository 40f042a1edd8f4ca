"""What a correction is predicted to give back at every budget up to its own size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from .allocation import GroupGains, allocate, by_benefit

__all__ = ["CurvePoint", "budget_curve"]

_POINTS = 12
_LEADING = ("1", "1.5", "2", "3", "5", "7")  # of the shares shown: about evenly spaced in their logarithm


@dataclass(frozen=True)
class CurvePoint:
    """One budget.

    Attributes:
        share_of_base: the budget as a share of the quantized weights' bytes.
        bytes: the budget in bytes.
        predicted: share of the whole model's predicted loss that the ranks it buys remove.
    """

    share_of_base: float
    bytes: int
    predicted: float


def budget_curve(group_gains: Sequence[GroupGains], total: float, base_bytes: int) -> list[CurvePoint]:
    """What each of about twelve budgets would recover: the largest round shares below the whole, and the whole.

    Args:
        group_gains: one a group.
        total: error of the whole model before any rank, in the unit of the gains.
        base_bytes: bytes of the quantized weights; 0 where they are not known.

    Returns:
        Points by bytes. Budgets that pay for no rank are left out, and nothing is left where no error was measured.
    """
    if total <= 0 or base_bytes <= 0:
        return []
    steps = by_benefit(group_gains)
    whole = sum(item.rank_bytes * len(item.gains) for item in group_gains)
    shares = [Decimal(digit).scaleb(power) for power in range(-6, 1) for digit in _LEADING]
    budgets = [(float(share), int(share * base_bytes)) for share in shares if share * base_bytes < whole]
    points = []
    for share, size in [*budgets[1 - _POINTS :], (whole / base_bytes, whole)]:
        chosen = allocate(steps, size)
        if chosen:
            points.append(CurvePoint(share, size, math.fsum(step.gain for step in chosen) / total))
    return points
