"""ASER's error reconstruction: each module's error, whitened by its input moment before it is truncated.

ASER factors the moment S = L L^T (Cholesky), truncates the SVD of E L and maps back by L^(-1). L and S^(1/2) differ by
an orthogonal matrix on the right, so that E L has the singular values and left vectors of E S^(1/2): the minimiser is
QERA-exact's, and so is the solve, which inverts nothing.

Two parts of the paper are not in it. Activation smoothing scales outlier channels and moves their weights into the
error before the weights are quantized, which is too late for a model that is quantized already. And the paper picks
each module's rank by the share of singular values that it reaches; here the rank is what the caller gives.
"""

from __future__ import annotations

from . import Method, register
from .qera import solve

__all__ = ["solve"]

register(
    Method(
        name="aser",
        shared=False,
        statistic="second",
        solve=solve,
        summary="per module, truncated after whitening, without ASER's activation smoothing; equals qera",
        source="ASER, AAAI 2025 (arXiv 2411.07762)",
    )
)
