"""Plain shared SVD: the baseline that looks at no activation."""

from __future__ import annotations

from torch import Tensor

from ..solver import Factors, factorize
from ..statistics import Moments
from . import Method, register

__all__ = ["solve"]


def solve(error: Tensor, moments: Moments, rank: int, seed: int) -> Factors:
    """Minimise ||E - AB||_F over the stacked members.

    Args:
        error: stacked weight error E of the group, shape (O, d).
        moments: not read.
        rank: rank kept, 1 <= rank <= min(O, d).
        seed: of the iteration's start.

    Source: Eckart and Young, 1936; the unweighted shared right factor follows SVDQuant (arXiv 2411.05007).
    """
    return factorize(error, None, rank, seed=seed)


register(
    Method(
        name="svd",
        shared=True,
        statistic="none",
        solve=solve,
        summary="one right factor per group from the weight error alone",
        source="Eckart and Young, 1936",
    )
)
