"""Budgets in words to bytes, and the ranks that they pay for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glowq.errors import ConfigError, RankError
from glowq.groups import Group
from glowq.selection import allocate, candidate_ranks, parse_budget, ranks_within, uniform_ranks

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


def groups_of(widths: list[tuple[int, int]]) -> list[Group]:
    return [Group(f"g{i}", (f"g{i}",), inputs, (outputs,), "") for i, (outputs, inputs) in enumerate(widths)]


def test_one_rank_for_all_as_far_as_a_group_allows() -> None:
    groups = groups_of([(9, 9), (3, 8)])
    assert uniform_ranks(groups, 5) == {"g0": 5, "g1": 3}
    with pytest.raises(RankError, match="between 1 and 9 for this model, found 10"):
        uniform_ranks(groups, 10)


def test_candidates_leave_room_to_choose_and_cost_no_more_than_the_budget_alone() -> None:
    groups = groups_of([(64, 64), (512, 512)])
    ranks = candidate_ranks(groups, 3_000, 10**6, 2, shared=True)
    assert ranks == {"g0": 11, "g1": 1}
    assert candidate_ranks(groups, 1_000, 10**6, 2, shared=True) == {"g0": 3}
    assert candidate_ranks(groups, 23_040, 10**6, 2, shared=True) == {"g0": 64, "g1": 11}  # 10 for each if even


def test_a_budget_below_the_cheapest_rank_says_what_would_do(random_factors: Factory) -> None:
    groups = groups_of([(5, 30), (50, 20)])
    factors = [random_factors(group, dtype=torch.bfloat16) for group in groups]
    message = r"budget '0.5%' is 50 bytes, but one rank of the cheapest group takes 70 bytes \(0\.70%\); give at least"
    with pytest.raises(ConfigError, match=message):
        candidate_ranks(groups, "0.5%", 10_000, 2, shared=True)
    with pytest.raises(ConfigError, match=message):
        ranks_within(factors, {"g0": 3, "g1": 3}, "0.5%", 10_000)


@few
@given(
    gains=st.lists(st.lists(st.floats(0, 10), min_size=0, max_size=4), min_size=1, max_size=4),
    price=st.integers(1, 20),
    bought=st.integers(0, 12),
)
def test_at_one_price_no_other_choice_gains_more(gains: list[list[float]], price: int, bought: int) -> None:
    offered = {f"g{i}": sorted(gain, reverse=True) for i, gain in enumerate(gains)}
    ranks = allocate(offered, dict.fromkeys(offered, price), bought * price)
    assert sum(ranks.values()) <= bought
    every = product(*(range(len(gain) + 1) for gain in offered.values()))
    best = max(_gained(offered, dict(zip(offered, choice, strict=True))) for choice in every if sum(choice) <= bought)
    assert _gained(offered, ranks) == pytest.approx(best)


@few
@given(
    gains=st.lists(st.lists(st.floats(0.01, 10), min_size=1, max_size=4), min_size=1, max_size=4),
    prices=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    available=st.integers(0, 150),
)
def test_ranks_fit_and_nothing_that_still_fits_is_left(
    gains: list[list[float]], prices: list[int], available: int
) -> None:
    offered = {f"g{i}": sorted(gain, reverse=True) for i, gain in enumerate(gains)}
    costs = dict(zip(offered, prices, strict=False))
    ranks = allocate(offered, costs, available)
    left = available - sum(costs[name] * rank for name, rank in ranks.items())
    assert left >= 0
    assert all(costs[name] > left or ranks[name] == len(gain) for name, gain in offered.items())


def test_no_bytes_are_spent_on_what_gains_nothing() -> None:
    assert allocate({"a": [1.0, 0.0, 0.0], "b": []}, {"a": 1, "b": 1}, 100) == {"a": 1, "b": 0}


def _gained(offered: dict[str, list[float]], ranks: dict[str, int]) -> float:
    return sum(sum(gain[: ranks[name]]) for name, gain in offered.items())


def test_ranks_within_a_budget_go_where_the_gains_are(random_factors: Factory) -> None:
    factors = [random_factors(group, rank=4) for group in groups_of([(8, 8), (8, 8)])]
    factors[0] = replace(factors[0], gains=torch.tensor([9.0, 8.0, 7.0, 0.5]))
    factors[1] = replace(factors[1], gains=torch.tensor([2.0, 1.0, 0.1, 0.0]))
    price = 4 * (8 + 8)
    assert ranks_within(factors, {"g0": 4, "g1": 4}, 4 * price, 10_000) == {"g0": 3, "g1": 1}
    assert ranks_within(factors, {"g0": 2, "g1": 4}, 4 * price, 10_000) == {"g0": 2, "g1": 2}
    assert ranks_within(factors, {"g0": 4, "g1": 4}, 2 * price, 10_000) == {"g0": 2}
