"""EoRA: each module's error projected into the eigenspace of its input moment.

EoRA takes S = V diag(l) V^T, truncates the SVD of E V diag(l)^(1/2) and maps back. V is orthogonal, so that matrix has
the singular values and left vectors of E S^(1/2): the minimiser is QERA-exact's, and so is the solve.
"""

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

    Source: EoRA (arXiv 2410.21271), eigenspace projection.
    """
    check_measured(moments, "second")
    return factorize(error, moments.second, rank, energy=moments.energy, seed=seed)


register(
    Method(
        name="eora",
        shared=False,
        statistic="second",
        solve=solve,
        summary="per module, projected into the eigenspace of the input moment; equals qera",
        source="arXiv 2410.21271",
    )
)
