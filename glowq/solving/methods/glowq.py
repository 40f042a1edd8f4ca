"""glowq: one right factor per group; errors are measured in loss (two-sided) or in output units (one-sided)."""

from __future__ import annotations

from torch import Tensor

from ..low_rank import Factors, factorize
from ..moments import Moments
from .base import Method, check_measured, register

__all__ = ["solve"]

_DAMPING = 0.03  # of the mean diagonal, so that an error in an output direction with small gradients still counts


def solve(error: Tensor, moments: Moments, rank: int, seed: int) -> Factors:
    """Minimise trace((E - AB)^T G (E - AB) S) for a whole group: the loss that the error adds, to second order.

    Args:
        error: stacked weight error E of the group, shape (O, d).
        moments: must hold `second` (d, d), or `energy` (O, O) if that is smaller. May hold G in `output`, see
            `OutputMoment`. Without it, G is the identity and the gains are squared output errors.
        rank: rank to keep, 1 <= rank <= min(O, d).
        seed: seed of the iteration's start.

    Raises:
        CalibrationError: neither `second` nor `energy` was measured.

    Source: GlowQ (arXiv 2603.25385) sec. 3 for the shared factor.
    """
    check_measured(moments, "second")
    return factorize(
        error,
        moments.second,
        rank,
        energy=moments.energy,
        output_moment=moments.output,
        damping=_DAMPING,
        seed=seed,
    )


register(
    Method(
        name="glowq",
        shared=True,
        statistic="second",
        solve=solve,
        summary="one right factor per group, optimal for the loss that the group's error costs",
        source="arXiv 2603.25385",
        two_sided=True,
        allocation="gain",
    )
)

register(
    Method(
        name="d-rank",
        shared=True,
        statistic="second",
        solve=solve,
        summary="glowq-one-sided, with more ranks for groups whose error has a higher effective rank",
        source="D-Rank (arXiv 2509.25622) sec. 3, which compresses weights; here it allocates ranks to their errors",
        allocation="effective-rank",
    )
)

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
