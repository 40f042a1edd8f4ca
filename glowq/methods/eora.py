"""EoRA: each module's error projected into the eigenspace of its input moment.

EoRA takes S = V diag(l) V^T, truncates the SVD of E V diag(l)^(1/2) and maps back. V is orthogonal, so that matrix has
the singular values and left vectors of E S^(1/2): the minimiser is QERA-exact's, and so is the solve.
"""

from __future__ import annotations

from . import Method, register
from .qera import solve

__all__ = ["solve"]

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
