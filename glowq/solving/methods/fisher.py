"""FWSVD: a plain SVD whose rows are weighted by their Fisher information."""

from __future__ import annotations

from torch import Tensor

from ..low_rank import Factors, factorize
from ..moments import LowRankMoment, Moments, OutputMoment
from .base import Method, register

__all__ = ["solve"]

_DAMPING = 0.03  # of the mean Fisher information, so that a row without any still counts


def solve(error: Tensor, moments: Moments, rank: int, seed: int) -> Factors:
    """Minimise ||D^(1/2) (E - AB)||_F for one module, D being the Fisher information of each row, up to a constant.

    The Fisher information of row i is the sum over j of the mean of (g_i x_j)^2, for a gradient g at the outputs and
    the inputs x. All rows have the same inputs. If inputs and gradients are independent, it is in proportion to the
    mean of g_i^2, the diagonal of the output moment, which is used here.

    Args:
        error: weight error E of the module, shape (o, d).
        moments: `output` is used; without it, D is the identity, and the method equals a plain SVD.
        rank: rank to keep, 1 <= rank <= min(o, d).
        seed: seed of the iteration's start.

    Source: FWSVD (arXiv 2207.00112) sec. 3, which weights the rows of W; here they are rows of the error of W.
    """
    rows = None if moments.output is None else _diagonal(moments.output)
    return factorize(error, None, rank, output_moment=rows, damping=_DAMPING, seed=seed)


def _diagonal(moment: OutputMoment) -> Tensor:
    if isinstance(moment, LowRankMoment):
        return moment.full_diagonal()
    return moment.diagonal() if moment.ndim == 2 else moment


register(
    Method(
        name="fwsvd",
        shared=False,
        statistic="none",
        solve=solve,
        summary="per module, rows weighted by their Fisher information",
        source="arXiv 2207.00112",
        two_sided=True,
    )
)
