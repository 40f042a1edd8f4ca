"""Budgets in words to bytes, and the largest ranks that they pay for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glowq.errors import ConfigError
from glowq.groups import Group
from glowq.selection import parse_budget, ranks_within, uniform_rank

Factory = Callable[..., Any]
few = settings(derandomize=True, max_examples=100, deadline=None, database=None)


@pytest.mark.parametrize(
    ("budget", "size"),
    [
        ("1%", 1_000),
        ("1.5%", 1_500),
        ("100 %", 100_000),
        (" 0.5% ", 500),
        ("200MB", 200 * 10**6),
        ("1.5 kb", 1_500),
        ("2KiB", 2_048),
        ("3mib", 3 * 2**20),
        ("1GiB", 2**30),
        ("2GB", 2 * 10**9),
        ("64B", 64),
        ("64", 64),
        (4096, 4096),
        (4096.0, 4096),
    ],
)
def test_shares_and_sizes(budget: str | int | float, size: int) -> None:
    assert parse_budget(budget, 100_000) == size


@pytest.mark.parametrize(
    "budget", ["", "%", "a lot", "-1%", "-5", "1IB", "5K", "1TB", "1%%", "1e3", "NaN", "inf", None]
)
def test_what_is_no_budget_is_refused(budget: Any) -> None:
    with pytest.raises(ConfigError, match="is neither a share"):
        parse_budget(budget, 100_000)


@pytest.mark.parametrize("budget", ["0", "0%", 0, "0.0MB"])
def test_nothing_is_no_budget(budget: str | int) -> None:
    with pytest.raises(ConfigError, match="must be above zero"):
        parse_budget(budget, 100_000)


def test_the_uniform_rank_fits_and_one_more_would_not() -> None:
    for available in (70, 139, 140, 141, 7_000):
        rank = uniform_rank(70, available, 10_000)
        assert rank * 70 <= available < (rank + 1) * 70


def test_a_budget_below_rank_one_says_what_would_do() -> None:
    with pytest.raises(ConfigError, match=r"budget '0.5%' is 50 bytes, but one rank .* takes 70 bytes \(0\.70%\)"):
        uniform_rank(70, "0.5%", 10_000)


@few
@given(
    widths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    caps=st.lists(st.integers(1, 12), min_size=5, max_size=5),
    available=st.integers(4, 4_000),
)
def test_ranks_within_a_budget_are_the_largest_uniform_ones(
    random_factors: Factory, widths: list[tuple[int, int]], caps: list[int], available: int
) -> None:
    factors = [
        random_factors(Group(f"g{index}", (f"g{index}",), inputs, (outputs,), ""), rank=cap)
        for index, ((outputs, inputs), cap) in enumerate(zip(widths, caps, strict=False))
    ]
    limits = {entry.group.name: entry.rank for entry in factors}

    def cost(rank: int) -> int:
        return sum(4 * (e.group.in_features + e.group.out_features[0]) * min(rank, e.rank) for e in factors)

    if cost(1) > available:
        with pytest.raises(ConfigError, match="give at least that"):
            ranks_within(factors, limits, available, 10_000)
        return
    best = max(rank for rank in range(1, 13) if cost(rank) <= available)
    assert ranks_within(factors, limits, available, 10_000) == {n: min(best, cap) for n, cap in limits.items()}
