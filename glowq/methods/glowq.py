"""GlowQ without shrinkage: one right factor a group, optimal under the full input moment."""

from __future__ import annotations

from torch import Tensor

from ..solver import Factors, factorize
from ..statistics import Moments
from . import Method, check_measured, register

__all__ = ["solve"]


def solve(error: Tensor, moments: Moments, rank: int, seed: int) -> Factors:
    """Minimise trace((E - AB) S (E - AB)^T) over a whole group.

    Args:
        error: stacked weight error E of the group, shape (O, d).
        moments: holds `second` (d, d), or `energy` (O, O) where that is smaller; squared activation units.
        rank: rank kept, 1 <= rank <= min(O, d).
        seed: of the iteration's start.

    Raises:
        CalibrationError: the moments lack what is minimised.

    Source: GlowQ (arXiv 2603.25385) sec. 3, solved without its square root, inverse and shrinkage.
    """
    check_measured(moments, "second")
    return factorize(error, moments.second, rank, energy=moments.energy, seed=seed)


register(
    Method(
        name="glowq",
        shared=True,
        statistic="second",
        solve=solve,
        summary="one right factor per group, optimal for the group's mean squared output error",
        source="arXiv 2603.25385",
    )
)
