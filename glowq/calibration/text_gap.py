"""How much more a correction would gain if its calibration text were longer.

The input moments of a block's groups are summed over the first and over the second half of the text. Factors that are
solved with one half gain less on the other half than on their own, because they also fit what is special to their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..solving.low_rank import factorize
from ..solving.moments import Moments

__all__ = ["TextGap", "lost_to_sampling", "text_gap"]


@dataclass(frozen=True)
class TextGap:
    """Gains of a group's ranks that were solved with one half of the text. The mean of both halves.

    Attributes:
        own: the gain of each rank on the half that it was solved with, shape (r,), float64, in the unit of the gains.
        other: the same on the other half.
    """

    own: Tensor
    other: Tensor


def text_gap(error: Tensor, first: Moments, whole: Moments, rank: int, seed: int) -> TextGap:
    """Solve a group with each half of the text, and count its gains on the other half.

    Rank j has the row b_j of the right factor and the column a_j of the left one. Its gain under a moment S is
    |L^T a_j|^2 (b_j S b_j^T), so that for another S only b_j S b_j^T is computed again.

    Args:
        error: stacked weight error E, shape (O, d).
        first: moments of the first half of the text, with `second`.
        whole: moments of the whole text, with `second`; `output` is used for both halves.
        rank: rank to solve.
        seed: seed of the solver.
    """
    assert first.second is not None
    assert whole.second is not None
    rest = whole.tokens - first.tokens
    second = (whole.second * whole.tokens - first.second * first.tokens) / rest
    halves = (first.second, second)
    own, other = second.new_zeros(rank), second.new_zeros(rank)
    for seen, unseen in (halves, halves[::-1]):
        factors = factorize(error, seen, rank, output_moment=whole.output, seed=seed)
        right = factors.right.double()
        before, after = (((right @ moment) * right).sum(1) for moment in (seen, unseen))
        own += factors.gains / 2
        other += factors.gains * (after / before.clamp_min(1e-300)) / 2
    return TextGap(own.cpu(), other.cpu())


def lost_to_sampling(gaps: Mapping[str, TextGap], ranks: Mapping[str, int]) -> tuple[float, float] | None:
    """What a correction of these ranks would gain more with text without end, and what holds on other text.

    Factors of n/2 tokens gain c + e on their own text and c - e on other text, where c is what endless text would give,
    and e falls as 1/n. So factors of all n tokens lose e/2, a quarter of the difference.

    Args:
        gaps: group name -> its gap.
        ranks: group name -> its rank in the correction; groups that are not named are left out.

    Returns:
        (gain that endless text would add, as a share of the gain; gain of a half on the other half, as a share of that
        on its own). None if no group has a gain.
    """
    chosen = [(gap, ranks[name]) for name, gap in gaps.items() if name in ranks]
    own, other = (sum(float(getattr(gap, side)[:rank].sum()) for gap, rank in chosen) for side in ("own", "other"))
    if not own > 0:
        return None
    return max(0.0, own - other) / (own + 3 * other), other / own
