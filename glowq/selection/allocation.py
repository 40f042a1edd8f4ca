"""Greedy allocation of bytes: the next ranks of whichever group gain most for what they take."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..factors.group import Group

__all__ = ["GroupGains", "Step", "allocate", "by_benefit", "largest_rank", "reach"]


@dataclass(frozen=True)
class GroupGains:
    """What the ranks of one group gain and take; known before any of its factors is read.

    Attributes:
        group: the group.
        rank_bytes: bytes of one rank of its factors.
        gains: error that each rank held removes, descending, in one unit for all groups.
    """

    group: Group
    rank_bytes: int
    gains: Sequence[float]


@dataclass(frozen=True)
class Step:
    """The next ranks of one group.

    Attributes:
        name: of the group.
        rank: what the group has once the step is taken.
        bytes: what the step takes.
        gain: error that it removes.
    """

    name: str
    rank: int
    bytes: int
    gain: float


def by_benefit(group_gains: Sequence[GroupGains], rank_step: int = 1, max_rank: int | None = None) -> list[Step]:
    """Every step that gains anything, the best for its bytes first, and each group's own in order.

    Gains of one group fall from rank to rank, and so do the sums of equal steps: taking the first steps of this list is
    optimal for the bytes that they take.

    Args:
        group_gains: one a group.
        rank_step, max_rank: see `RankRequest`.
    """
    queues = [_steps(item, rank_step, max_rank) for item in group_gains]
    return list(heapq.merge(*queues, key=lambda step: (-step.gain / step.bytes, step.name)))


def allocate(steps: Sequence[Step], available: int) -> list[Step]:
    """The steps that fit in `available` bytes: the best first, and with the last bytes the best that still fit.

    Args:
        steps: as `by_benefit` orders them.
        available: bytes.
    """
    chosen: list[Step] = []
    closed: set[str] = set()
    for step in steps:
        if step.bytes > available:
            closed.add(step.name)  # its later ranks are nothing without these
        elif step.name not in closed:
            available -= step.bytes
            chosen.append(step)
    return chosen


def reach(steps: Sequence[Step], gain: float) -> list[Step] | None:
    """The fewest first steps that gain at least `gain` together; None where all of them gain less.

    Args:
        steps: as `by_benefit` orders them.
        gain: in the unit of the steps, above zero.
    """
    found = 0.0
    for count, step in enumerate(steps, 1):
        found += step.gain
        if found >= gain:
            return list(steps[:count])
    return None


def largest_rank(group: Group) -> int:
    """The rank at which a group's correction is exact."""
    return min(sum(group.out_features), group.in_features)


def _steps(item: GroupGains, rank_step: int, max_rank: int | None) -> Iterator[Step]:
    most = len(item.gains) if max_rank is None else min(len(item.gains), max_rank)
    ends = list(range(rank_step, most + 1, rank_step))
    largest = largest_rank(item.group)
    if largest % rank_step and most >= largest:
        ends.append(largest)
    for start, end in zip([0, *ends], ends, strict=False):
        gain = math.fsum(item.gains[start:end])
        if gain <= 0:
            return
        yield Step(item.group.name, end, (end - start) * item.rank_bytes, gain)
