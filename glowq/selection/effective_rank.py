"""The effective rank of an error: in how many directions it lies, each counted by its share."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["effective_rank"]


def effective_rank(gains: Tensor, total: float, directions: int) -> float:
    """The exponential of the entropy of the shares that the directions of an error have in it.

    Args:
        gains: squared singular values of the weighted error of a group, the largest first, shape (r,).
        total: sum of all its squared singular values. What lies beyond the first r of them is taken to be spread evenly
            over the other directions.
        directions: number of all directions, at least r.

    Returns:
        A number from 1 to `directions`; 1 for an error of zero.

    Source: D-Rank (arXiv 2509.25622) sec. 3; Roy and Vetterli, The effective rank (2007).
    """
    if not total > 0:
        return 1.0
    shares = [share for share in (gains / total).tolist() if share > 0]
    rest, others = 1 - math.fsum(shares), directions - len(gains)
    entropy = -math.fsum(share * math.log(share) for share in shares)
    if rest > 0 and others > 0:
        entropy -= rest * math.log(rest / others)
    return math.exp(entropy)
