"""Greedy allocation of bytes: the ranks with the largest gain per byte are chosen first."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..factors.group import Group

__all__ = ["GroupGains", "Step", "allocate", "by_benefit", "largest_rank", "reach"]


@dataclass(frozen=True)
class GroupGains:
    """The gains and the bytes of the ranks of one group, which are known before any of its factors is read.

    Attributes:
        group: the group.
        rank_bytes: bytes of one rank of its factors.
        gains: error that each available rank removes, descending, in one unit for all groups.
    """

    group: Group
    rank_bytes: int
    gains: Sequence[float]


@dataclass(frozen=True)
class Step:
    """The next ranks of one group.

    Attributes:
        name: name of the group.
        rank: rank of the group after the step.
        bytes: bytes that the step adds.
        gain: error that the step removes.
    """

    name: str
    rank: int
    bytes: int
    gain: float


def by_benefit(group_gains: Sequence[GroupGains], rank_step: int = 1, max_rank: int | None = None) -> list[Step]:
    """Return every step with a gain, the largest gain per byte first, and the steps of each group in order.

    The gains of one group fall from rank to rank, and so do the gains of its steps of equal size. Therefore the first
    steps of this list are the optimum for the bytes that they take together.

    Args:
        group_gains: one entry per group.
        rank_step, max_rank: see `RankRequest`.
    """
    queues = [_steps(item, rank_step, max_rank) for item in group_gains]
    return list(heapq.merge(*queues, key=lambda step: (-step.gain / step.bytes, step.name)))


def allocate(steps: Sequence[Step], available: int) -> list[Step]:
    """Choose the steps that fit in `available` bytes: in order, but a step that no longer fits is left out.

    Args:
        steps: steps in the order of `by_benefit`.
        available: number of bytes.
    """
    chosen: list[Step] = []
    closed: set[str] = set()
    for step in steps:
        if step.bytes > available:
            closed.add(step.name)  # later ranks of the group cannot be used without these
        elif step.name not in closed:
            available -= step.bytes
            chosen.append(step)
    return chosen


def reach(steps: Sequence[Step], gain: float) -> list[Step] | None:
    """Return the fewest first steps that together gain at least `gain`, or None if all steps gain less.

    Args:
        steps: steps in the order of `by_benefit`.
        gain: gain to reach, in the unit of the steps, above zero.
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
