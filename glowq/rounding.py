"""Factors rounded to int8: what that is predicted to cost, and when it is refused.

A byte a value instead of two buys twice the ranks. What rounding takes must be less than that: the yardstick is the
same correction, unrounded, cut to the bytes that the rounded one takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .allocation import Offer, allocate, by_benefit
from .errors import ConfigError, RoundingError
from .int8 import SCALE_BYTES, round_factors
from .runtime import GroupFactors

__all__ = ["FACTOR_DTYPES", "NEGLIGIBLE", "check_factor_dtype", "check_rounding", "priced", "rounded", "undone"]

FACTOR_DTYPES = ("auto", "int8")
"""What factors can be stored in: the model's own dtype, or a byte a value."""

NEGLIGIBLE = 0.01
"""Share of what a correction gains, below which nobody minds a difference."""


def check_factor_dtype(factor_dtype: str) -> None:
    """Refuse what is none of `FACTOR_DTYPES`.

    Raises:
        ConfigError: naming what there is.
    """
    if factor_dtype not in FACTOR_DTYPES:
        raise ConfigError(f"factor_dtype must be one of {', '.join(FACTOR_DTYPES)}, found {factor_dtype!r}.")


def rounded(entry: GroupFactors) -> GroupFactors:
    """One group's factors rounded to int8, and its gains less what the rounding is predicted to take of them.

    A rank that is off by a share e of its own size, squared, is predicted to lose that share of its gain.
    """
    if entry.int8:
        return entry
    right, lefts = round_factors(entry.right, entry.lefts)
    kept = 1 - _relative_errors(entry, right, lefts)
    gains = (entry.gains * kept.clamp(min=0)).cummin(0).values  # which descend from rank to rank
    return replace(entry, right=right, lefts=lefts, gains=gains, int8=True)


def priced(offers: Sequence[Offer], factor_dtype: str) -> Sequence[Offer]:
    """What groups have to sell once their factors are stored as `factor_dtype`: in int8 a rank is about half as dear.

    Raises:
        ConfigError: `factor_dtype` is none of `FACTOR_DTYPES`.
    """
    check_factor_dtype(factor_dtype)
    if factor_dtype == "auto":
        return offers
    return [
        replace(offer, rank_bytes=offer.group.in_features + sum(offer.group.out_features) + SCALE_BYTES)
        for offer in offers
    ]


def undone(figures: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Shares of the quantized model's divergence that a correction undoes in "int8", and unrounded.

    Args:
        figures: what `glowq.rounding_cost` measured; None where nothing was rounded.

    Returns:
        None where nothing was measured, or quantization changed nothing.
    """
    if not figures or figures["quantized"] <= 0:
        return None
    return {name: 1 - figures[name] / figures["quantized"] for name in ("int8", "same_bytes", "same_ranks")}


def check_rounding(offers: Sequence[Offer], found: Sequence[Offer]) -> None:
    """Refuse int8 factors that are predicted to gain less than unrounded ones in the same bytes.

    Args:
        offers: of the groups, unrounded; where no gain was measured, nothing is predicted.
        found: of the same groups, rounded.

    Raises:
        RoundingError: by more than a hundredth of the whole; the message holds both predictions.
    """
    available = sum(offer.rank_bytes * len(offer.gains) for offer in found)
    unrounded = sum(step.gain for step in allocate(by_benefit(offers), available))
    gain, whole = (sum(sum(offer.gains) for offer in several) for several in (found, offers))
    if gain < unrounded - NEGLIGIBLE * whole:
        raise RoundingError(
            f"int8 factors are predicted to keep {gain / whole:.1%} of what these factors gain, and unrounded ones cut "
            f"to the same {available:,} bytes {unrounded / whole:.1%}: rounding loses more than it wins. Leave out "
            "int8, and cut to a budget instead."
        )


def _relative_errors(entry: GroupFactors, right: Tensor, lefts: Mapping[str, Tensor]) -> Tensor:
    """Squared error of each rank's product A B over its square, shape (r,), float64; 0 for a rank that is zero."""
    before = torch.cat([left.double() for left in entry.lefts.values()])
    after = torch.cat([lefts[member].double() for member in entry.lefts])
    rows, new_rows = entry.right.double(), right.double()
    size = before.square().sum(0) * rows.square().sum(1)
    both = (before * after).sum(0) * (rows * new_rows).sum(1)
    new_size = after.square().sum(0) * new_rows.square().sum(1)
    return torch.where(size > 0, (size - 2 * both + new_size).clamp(min=0) / size.where(size > 0, 1), 0.0)
