"""The published methods that glowq is compared with; each is one call of the same solver.

ASER and EoRA compute the minimiser of QERA-exact in other ways. Here they use the same solve as QERA-exact:

- ASER factors the moment S = L L^T (Cholesky), truncates the SVD of E L and maps back by L^(-1). L and S^(1/2) differ
  by an orthogonal matrix on the right, so that E L has the singular values and left vectors of E S^(1/2). Two parts of
  the paper are left out. Activation smoothing scales outlier channels and moves their weights into the error before the
  weights are quantized, which is not possible for a model that is quantized already. The paper also chooses each
  module's rank by the share of singular values that it reaches; here the caller gives the rank.
- EoRA takes S = V diag(l) V^T, truncates the SVD of E V diag(l)^(1/2) and maps back. V is orthogonal, so that matrix
  has the singular values and left vectors of E S^(1/2).
"""

from __future__ import annotations

from torch import Tensor

from ..low_rank import Factors, factorize
from ..moments import Moments
from .base import Method, check_measured, register

__all__ = ["solve_exact", "solve_magnitude", "solve_svd"]


def solve_magnitude(error: Tensor, moments: Moments, rank: int, seed: int) -> Factors:
    """Minimise ||(E - AB) diag(a)||_F for one module, a being the mean magnitude of each input.

    Args:
        error: weight error E of the module, shape (o, d).
        moments: must hold `magnitude` (d,), activation units.
        rank: rank to keep, 1 <= rank <= min(o, d).
        seed: seed of the iteration's start.

    Raises:
        CalibrationError: `magnitude` was not measured.

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
        solve=solve_magnitude,
        summary="per module, inputs weighted by their mean magnitude (L2QER)",
        source="arXiv 2402.02446",
    )
)


def solve_exact(error: Tensor, moments: Moments, rank: int, seed: int) -> Factors:
    """Minimise trace((E - AB) S (E - AB)^T) for one module.

    Args:
        error: weight error E of the module, shape (o, d).
        moments: must hold `second` (d, d), or `energy` (o, o), in squared activation units.
        rank: rank to keep, 1 <= rank <= min(o, d).
        seed: seed of the iteration's start.

    Raises:
        CalibrationError: neither `second` nor `energy` was measured.

    Source: QERA (arXiv 2410.06040), QERA-exact; the same optimum without the paper's square root and inverse.
    """
    check_measured(moments, "second")
    return factorize(error, moments.second, rank, energy=moments.energy, seed=seed)


register(
    Method(
        name="qera",
        shared=False,
        statistic="second",
        solve=solve_exact,
        summary="per module, optimal for the module's mean squared output error (QERA-exact)",
        source="arXiv 2410.06040",
    )
)

register(
    Method(
        name="aser",
        shared=False,
        statistic="second",
        solve=solve_exact,
        summary="per module, truncated after whitening, without ASER's activation smoothing; equals qera",
        source="ASER, AAAI 2025 (arXiv 2411.07762)",
    )
)

register(
    Method(
        name="eora",
        shared=False,
        statistic="second",
        solve=solve_exact,
        summary="per module, projected into the eigenspace of the input moment; equals qera",
        source="arXiv 2410.21271",
    )
)


def solve_svd(error: Tensor, moments: Moments, rank: int, seed: int) -> Factors:
    """Minimise ||E - AB||_F over the stacked members.

    Args:
        error: stacked weight error E of the group, shape (O, d).
        moments: not used.
        rank: rank to keep, 1 <= rank <= min(O, d).
        seed: seed of the iteration's start.

    Source: Eckart and Young, 1936; the unweighted shared right factor follows SVDQuant (arXiv 2411.05007).
    """
    return factorize(error, None, rank, seed=seed)


register(
    Method(
        name="svd",
        shared=True,
        statistic="none",
        solve=solve_svd,
        summary="one right factor per group from the weight error alone",
        source="Eckart and Young, 1936",
    )
)

register(
    Method(
        name="zeroquant",
        shared=False,
        statistic="none",
        solve=solve_svd,
        summary="plain SVD of each module's weight error (LoRC)",
        source="arXiv 2303.08302",
    )
)
