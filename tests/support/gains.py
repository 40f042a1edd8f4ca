"""Measured gains of made-up groups, and how often hypothesis tries."""

from __future__ import annotations

from hypothesis import settings

from glowq.factors.group import Group
from glowq.selection.allocation import GroupGains

few = settings(derandomize=True, max_examples=150, deadline=None, database=None)


def groups_of(widths: list[tuple[int, int]]) -> list[Group]:
    return [Group(f"g{i}", (f"g{i}",), inputs, (outputs,), "") for i, (outputs, inputs) in enumerate(widths)]


def gains_of(gains: list[list[int]], prices: list[int], largest: list[int]) -> list[GroupGains]:
    """One group an entry: what its ranks gain, what one costs, and the rank that its shape allows."""
    groups = groups_of([(most, most) for most in largest])
    return [GroupGains(group, price, gain) for group, price, gain in zip(groups, prices, gains, strict=False)]


def allowed(held: int, largest: int, step: int, cap: int | None) -> list[int]:
    """The ranks that a group may end with: multiples of the step, and all that its shape allows."""
    most = held if cap is None else min(held, cap)
    return [rank for rank in range(1, most + 1) if rank % step == 0 or rank == largest]
