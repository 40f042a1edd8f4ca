"""ZeroQuant-V2's low-rank compensation: plain SVD of each module's weight error."""

from __future__ import annotations

from torch import Tensor

from ..solver import Factors, factorize
from ..statistics import Moments
from . import Method, register

__all__ = ["solve"]


def solve(error: Tensor, moments: Moments, rank: int, seed: int) -> Factors:
    """Minimise ||E - AB||_F for one module.

    Args:
        error: weight error E of the module, shape (o, d).
        moments: not read.
        rank: rank kept, 1 <= rank <= min(o, d).
        seed: of the iteration's start.

    Source: ZeroQuant-V2 (arXiv 2303.08302), low rank compensation (LoRC).
    """
    return factorize(error, None, rank, seed=seed)


register(
    Method(
        name="zeroquant",
        shared=False,
        statistic="none",
        solve=solve,
        summary="plain SVD of each module's weight error (LoRC)",
        source="arXiv 2303.08302",
    )
)
