"""Divide a budget between ranks and bits: which groups get more bits, and which keep their width and get ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .allocation import GroupGains, Step, by_benefit

__all__ = ["Division", "divide"]

_HALVINGS = 60


@dataclass(frozen=True)
class Division:
    """The division of a budget.

    Attributes:
        wider: names of the groups that get more bits.
        wider_bytes: bytes of these bits.
        rank_bytes: bytes of the ranks that gain more for their bytes than any bits.
    """

    wider: frozenset[str]
    wider_bytes: int
    rank_bytes: int


def divide(
    ranks: Sequence[GroupGains],
    wider: Mapping[str, Step],
    available: int,
    *,
    rank_step: int = 1,
    max_rank: int | None = None,
) -> Division:
    """Choose for every group more bits, ranks, or neither, by what each gains above one price per byte for all.

    The price is the lowest at which everything fits. A group with more bits is given no ranks here: they remove an
    error that the bits have changed. Bytes that are left when the next group with more bits does not fit are not
    divided; later ranks use them.

    Args:
        ranks: gains and bytes of the ranks of each group, in the unit of the gains of `wider`.
        wider: group name -> gain and bytes of more bits.
        available: bytes.
        rank_step, max_rank: see `glowq.selection.budget.RankRequest`.
    """
    steps: dict[str, list[Step]] = {name: [] for name in [*wider, *(item.group.name for item in ranks)]}
    for step in by_benefit(ranks, rank_step, max_rank):
        steps[step.name].append(step)
    highest = max((step.gain / step.bytes for found in (*steps.values(), wider.values()) for step in found), default=0)
    best = _at_price(steps, wider, 0.0)
    if best.wider_bytes + best.rank_bytes <= available or highest <= 0:
        return best
    low, high = math.log(highest) - _HALVINGS, math.log(highest) + 1
    best = Division(frozenset(), 0, 0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = _at_price(steps, wider, math.exp(middle))
        if found.wider_bytes + found.rank_bytes <= available:
            best, high = found, middle
        else:
            low = middle
    return best


def _at_price(steps: Mapping[str, Sequence[Step]], wider: Mapping[str, Step], price: float) -> Division:
    """What every group gets if each byte costs `price`."""
    chosen, wider_bytes, rank_bytes = set(), 0, 0
    for name, own in steps.items():
        worth = [step for step in own if step.gain > price * step.bytes]
        surplus = math.fsum(step.gain - price * step.bytes for step in worth)
        bits = wider.get(name)
        if bits is not None and bits.gain - price * bits.bytes > surplus:
            chosen.add(name)
            wider_bytes += bits.bytes
        else:
            rank_bytes += sum(step.bytes for step in worth)
    return Division(frozenset(chosen), wider_bytes, rank_bytes)
