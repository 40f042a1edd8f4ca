"""ZeroQuant-V2's low-rank compensation (LoRC, arXiv 2303.08302): plain SVD of each module's own weight error."""

from __future__ import annotations

from . import Method, register
from .svd import solve

__all__ = ["solve"]

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
