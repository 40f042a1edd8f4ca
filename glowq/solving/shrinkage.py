"""Shrinkage of an output moment that was estimated from few tokens, towards its diagonal and then towards the identity.

With G = L L^T, a correction A B = P E with the oblique projection P = L^-T U U^T L^T. If G is the identity, P is
orthogonal and no input can get a larger error than E gives it. The more the eigenvalues of G differ, the more P can
enlarge the error of inputs that were not measured. So G may differ from the identity only as far as the tokens show
that it really does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .moments import LowRankMoment, OutputMoment

__all__ = ["effective_tokens", "shrunk"]

# K and b of Heaps' law: ordinary text of 512 to 8,192 tokens counts in full (tests/solving/test_shrinkage.py).
_HEAPS = 6.0
_EXPONENT = 0.55


def effective_tokens(ids: Tensor) -> float:
    """Number of tokens of ordinary text that says as much as `ids` does, at most the number of tokens in `ids`.

    Heaps' law says that n tokens of ordinary text hold about K n^b distinct ones. Text that repeats itself holds fewer,
    and counts as the shorter text that holds as many.

    Args:
        ids: token ids of any shape.
    """
    distinct = len(ids.unique())
    return min(float(ids.numel()), (distinct / _HEAPS) ** (1 / _EXPONENT))


def shrunk(moment: OutputMoment, tokens: float) -> OutputMoment:
    """Shrink G as far as the sampling error of `tokens` samples asks for.

    G becomes (1 - a) G + a T, with T = (1 - b) diag(G) + b mean(diag(G)) I. The shares a and b are the expected squared
    sampling error of the entries off the diagonal, and on it, over their squares in G, at most 1.

    Args:
        moment: G, shape (O, O), or a diagonal plus a low-rank part.
        tokens: number of independent gradients in its mean, see `effective_tokens`.

    Returns:
        The shrunk moment in the same form.

    Source: Schaefer and Strimmer, A shrinkage approach to large-scale covariance matrix estimation (2005), targets D
    and B, with the sampling variances of a normal distribution.
    """
    diagonal = moment.full_diagonal() if isinstance(moment, LowRankMoment) else moment.diagonal().double()
    trace, squares = diagonal.sum(), diagonal.square().sum()
    off = _squared_norm(moment) - squares
    share = float(((off + trace.square() - squares) / tokens / off.clamp_min(1e-300)).clamp(0, 1))
    mean = diagonal.mean()
    spread = (diagonal - mean).square().sum()
    flat = float((2 * squares / tokens / spread.clamp_min(1e-300)).clamp(0, 1))
    target = share * ((1 - flat) * diagonal + flat * mean)
    if isinstance(moment, LowRankMoment):
        rest = (1 - share) * moment.diagonal.double() + target
        return LowRankMoment(rest.to(moment.diagonal.dtype), moment.factor * (1 - share) ** 0.5)
    return (moment * (1 - share)).diagonal_scatter(((1 - share) * diagonal + target).to(moment.dtype))


def _squared_norm(moment: OutputMoment) -> Tensor:
    """Squared Frobenius norm, float64."""
    if not isinstance(moment, LowRankMoment):
        return torch.linalg.vector_norm(moment, dtype=torch.float64).square()
    diagonal, factor = moment.diagonal.double(), moment.factor.double()
    cross = 2 * (diagonal * factor.square().sum(1)).sum()
    return diagonal.square().sum() + cross + torch.linalg.vector_norm(factor.T @ factor).square()
