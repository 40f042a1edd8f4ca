"""Round factors to whole numbers of few bits, and predict how much this reduces their gains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .factors import GroupFactors
from .integers import round_factors

__all__ = ["round_group"]


def round_group(entry: GroupFactors, bits: int) -> GroupFactors:
    """Round one group's factors to `bits` bits per value, and reduce its gains by the predicted loss.

    If the squared error of a rank's product A B is a share e of its square, the rank is predicted to lose the share e
    of its gain.
    """
    if entry.bits == bits:
        return entry
    right, lefts = round_factors(entry.right, entry.lefts, bits)
    kept = 1 - _relative_errors(entry, right, lefts)
    gains = (entry.gains * kept.clamp(min=0)).cummin(0).values  # gains must not rise from rank to rank
    return replace(entry, right=right, lefts=lefts, gains=gains, bits=bits)


def _relative_errors(entry: GroupFactors, right: Tensor, lefts: Mapping[str, Tensor]) -> Tensor:
    """Squared error of each rank's product A B over its square, shape (r,), float64; 0 for a rank that is zero."""
    before = torch.cat([left.double() for left in entry.lefts.values()])
    after = torch.cat([lefts[member].double() for member in entry.lefts])
    rows, new_rows = entry.right.double(), right.double()
    size = before.square().sum(0) * rows.square().sum(1)
    both = (before * after).sum(0) * (rows * new_rows).sum(1)
    new_size = after.square().sum(0) * new_rows.square().sum(1)
    return torch.where(size > 0, (size - 2 * both + new_size).clamp(min=0) / size.where(size > 0, 1), 0.0)
