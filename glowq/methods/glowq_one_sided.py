"""GlowQ without shrinkage and without gradients: one right factor a group, optimal under the full input moment."""

from __future__ import annotations

from . import Method, register
from .glowq import solve

register(
    Method(
        name="glowq-one-sided",
        shared=True,
        statistic="second",
        solve=solve,
        summary="one right factor per group, optimal for the group's mean squared output error",
        source="arXiv 2603.25385",
    )
)
