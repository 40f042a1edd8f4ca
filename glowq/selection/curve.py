"""Predict what a correction recovers at each budget up to its own size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from .allocation import GroupGains, allocate, by_benefit

__all__ = ["CurvePoint", "budget_curve"]

_POINTS = 12
_LEADING = ("1", "1.5", "2", "3", "5", "7")  # leading digits of the shares, about evenly spaced in their logarithm


@dataclass(frozen=True)
class CurvePoint:
    """One budget.

    Attributes:
        share_of_base: the budget as a share of the quantized weights' bytes.
        bytes: the budget in bytes.
        predicted: share of the whole model's predicted loss that the ranks within the budget remove.
    """

    share_of_base: float
    bytes: int
    predicted: float


def budget_curve(group_gains: Sequence[GroupGains], total: float, base_bytes: int) -> list[CurvePoint]:
    """Predict what about twelve budgets recover: the largest round shares below the correction's size, and its size.

    Args:
        group_gains: one entry per group.
        total: error of the whole model without a correction, in the unit of the gains.
        base_bytes: bytes of the quantized weights; 0 if they are not known.

    Returns:
        Points in order of their bytes. Budgets that are too small for any rank are left out. There are no points if no
        error was measured or `base_bytes` is 0.
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
