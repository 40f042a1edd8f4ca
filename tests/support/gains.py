"""Groups with invented gains, and hypothesis settings, for the tests of rank selection."""

from __future__ import annotations

from hypothesis import settings

from glowq.factors.group import Group
from glowq.selection.allocation import GroupGains

few = settings(derandomize=True, max_examples=150, deadline=None, database=None)


def groups_of(widths: list[tuple[int, int]]) -> list[Group]:
    return [Group(f"g{i}", (f"g{i}",), inputs, (outputs,), "") for i, (outputs, inputs) in enumerate(widths)]


def gains_of(gains: list[list[int]], rank_bytes: list[int], largest: list[int]) -> list[GroupGains]:
    """Build one group per entry, from the gains of its ranks, the bytes of one rank and the largest rank it allows."""
    groups = groups_of([(most, most) for most in largest])
    return [GroupGains(group, size, gain) for group, size, gain in zip(groups, rank_bytes, gains, strict=False)]


def allowed(held: int, largest: int, step: int, cap: int | None) -> list[int]:
    """Return the ranks that a group may get: multiples of the step, and the largest rank that its shape allows."""
    most = held if cap is None else min(held, cap)
    return [rank for rank in range(1, most + 1) if rank % step == 0 or rank == largest]
