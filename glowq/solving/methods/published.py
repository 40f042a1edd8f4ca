"""GlowQ as in its paper, and GlowQ-S, which corrects whole groups at a fixed rank in the order of a score."""

from __future__ import annotations

from torch import Tensor

from ..low_rank import Factors, factorize
from ..moments import Moments
from .base import Method, check_measured, register

__all__ = ["score_error_ratio", "score_singular_values", "solve"]

_SHRINKAGE = 0.05


def solve(error: Tensor, moments: Moments, rank: int, seed: int) -> Factors:
    """Minimise trace((E - AB) S' (E - AB)^T) with S' = 0.95 S + 0.05 tr(S)/d I.

    Args:
        error: stacked weight error E of the group, shape (O, d).
        moments: must hold `second` (d, d), or `energy` (O, O): E S' E^T = 0.95 energy + 0.05 tr(S)/d E E^T.
        rank: rank to keep, 1 <= rank <= min(O, d).
        seed: seed of the iteration's start.

    Raises:
        CalibrationError: neither `second` nor `energy` was measured.

    Source: GlowQ (arXiv 2603.25385) sec. 3; the shrinkage keeps the paper's S^(-1/2) finite.
    """
    check_measured(moments, "second")
    assert moments.mean_square is not None
    level = _SHRINKAGE * moments.mean_square
    if moments.energy is not None:
        wide = error.to(moments.energy.dtype)
        energy = (1 - _SHRINKAGE) * moments.energy + level * (wide @ wide.T)
        return factorize(error, None, rank, energy=energy, seed=seed)
    assert moments.second is not None
    shrunk = (1 - _SHRINKAGE) * moments.second
    shrunk.diagonal().add_(level)
    return factorize(error, shrunk, rank, seed=seed)


register(
    Method(
        name="glowq-published",
        shared=True,
        statistic="second",
        solve=solve,
        summary="glowq with the paper's 5% shrinkage of the input moment",
        source="arXiv 2603.25385",
    )
)


def score_singular_values(gains: Tensor, error_ratio: float) -> float:
    """Sum of the singular values of E S'^(1/2) that the group's rank keeps.

    Args:
        gains: squares of the singular values, shape (r,), squared output units.
        error_ratio: not used.

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
        score=score_singular_values,
    )
)


def score_error_ratio(gains: Tensor, error_ratio: float) -> float:
    """||E||_F / ||W||_F of the whole group, which does not depend on the rank.

    Args:
        gains: not used.
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
        score=score_error_ratio,
    )
)
