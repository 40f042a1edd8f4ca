"""GlowQ-S by its other score: whole groups at a fixed rank, those of the largest relative weight error first."""

from __future__ import annotations

from torch import Tensor

from . import Method, register
from .glowq_published import solve

__all__ = ["score"]


def score(gains: Tensor, error_ratio: float) -> float:
    """||E||_F / ||W||_F of the whole group, whatever its rank would remove of it.

    Args:
        gains: not read.
        error_ratio: the score.

    Source: GlowQ (arXiv 2603.25385), GlowQ-S: the normalized error ratio.
    """
    return error_ratio


register(
    Method(
        name="glowq-s-ratio",
        shared=True,
        statistic="second",
        solve=solve,
        summary="GlowQ-S: whole groups of glowq-published, the largest relative weight error first",
        source="arXiv 2603.25385",
        allocation="groups",
        score=score,
    )
)
