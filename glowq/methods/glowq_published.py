"""GlowQ as its paper has it: the group's input moment is shrunk by 5% towards its mean diagonal."""

from __future__ import annotations

from torch import Tensor

from ..solver import Factors, factorize
from ..statistics import Moments
from . import Method, check_measured, register

__all__ = ["solve"]

_SHRINKAGE = 0.05


def solve(error: Tensor, moments: Moments, rank: int, seed: int) -> Factors:
    """Minimise trace((E - AB) S' (E - AB)^T) with S' = 0.95 S + 0.05 tr(S)/d I.

    Args:
        error: stacked weight error E of the group, shape (O, d).
        moments: holds `second` (d, d), or `energy` (O, O): E S' E^T = 0.95 energy + 0.05 tr(S)/d E E^T.
        rank: rank kept, 1 <= rank <= min(O, d).
        seed: of the iteration's start.

    Raises:
        CalibrationError: the moments lack what is minimised.

    Source: GlowQ (arXiv 2603.25385) sec. 3; the shrinkage keeps its S^(-1/2) finite.
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
