"""LQER's activation-scaled SVD (L2QER): each input weighs as much as its mean magnitude."""

from __future__ import annotations

from torch import Tensor

from ..solver import Factors, factorize
from ..statistics import Moments
from . import Method, check_measured, register

__all__ = ["solve"]


def solve(error: Tensor, moments: Moments, rank: int, seed: int) -> Factors:
    """Minimise ||(E - AB) diag(a)||_F for one module, a being the mean magnitude of each input.

    Args:
        error: weight error E of the module, shape (o, d).
        moments: holds `magnitude` (d,), activation units.
        rank: rank kept, 1 <= rank <= min(o, d).
        seed: of the iteration's start.

    Raises:
        CalibrationError: the moments lack what is minimised.

    Source: LQER (arXiv 2402.02446) sec. 3.2; the paper's normalisation of a is a constant and changes no minimiser.
    """
    check_measured(moments, "magnitude")
    assert moments.magnitude is not None
    return factorize(error, moments.magnitude.square(), rank, seed=seed)


register(
    Method(
        name="lqer",
        shared=False,
        statistic="magnitude",
        solve=solve,
        summary="per module, inputs weighted by their mean magnitude (L2QER)",
        source="arXiv 2402.02446",
    )
)
