"""GlowQ-S as its paper has it: whole groups at a fixed rank, those of the largest singular values first."""

from __future__ import annotations

from torch import Tensor

from . import Method, register
from .glowq_published import solve

__all__ = ["score"]


def score(gains: Tensor, error_ratio: float) -> float:
    """Sum of the singular values of E S'^(1/2) that the group's rank keeps.

    Args:
        gains: their squares, shape (r,), squared output units.
        error_ratio: not read.

    Source: GlowQ (arXiv 2603.25385), GlowQ-S: the score from the singular values.
    """
    return float(gains.sqrt().sum())


register(
    Method(
        name="glowq-s",
        shared=True,
        statistic="second",
        solve=solve,
        summary="GlowQ-S: whole groups of glowq-published, the largest singular values first",
        source="arXiv 2603.25385",
        allocation="groups",
        score=score,
    )
)
