"""QERA-exact: each module's own optimum under its full input moment."""

from __future__ import annotations

from torch import Tensor

from ..solver import Factors, factorize
from ..statistics import Moments
from . import Method, check_measured, register

__all__ = ["solve"]


def solve(error: Tensor, moments: Moments, rank: int, seed: int) -> Factors:
    """Minimise trace((E - AB) S (E - AB)^T) for one module.

    Args:
        error: weight error E of the module, shape (o, d).
        moments: holds `second` (d, d), or `energy` (o, o); squared activation units.
        rank: rank kept, 1 <= rank <= min(o, d).
        seed: of the iteration's start.

    Raises:
        CalibrationError: the moments lack what is minimised.

    Source: QERA (arXiv 2410.06040), QERA-exact; the same optimum without its square root and inverse.
    """
    check_measured(moments, "second")
    return factorize(error, moments.second, rank, energy=moments.energy, seed=seed)


register(
    Method(
        name="qera",
        shared=False,
        statistic="second",
        solve=solve,
        summary="per module, optimal for the module's mean squared output error (QERA-exact)",
        source="arXiv 2410.06040",
    )
)
