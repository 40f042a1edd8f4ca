"""What published methods restore within a budget, computed by hand: whole groups, or ranks by effective rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch

from glowq import Correction, GlowQConfig
from glowq.artifact.factor_tensors import describe_groups
from glowq.factors.factors import GroupFactors
from glowq.factors.form import FactorForm
from glowq.factors.group import Group
from glowq.pipeline.compare.budgets import ALLOCATORS, BudgetContext, Entry, fixed_rank_within
from glowq.solving.methods.base import Method, get_method

HALF = FactorForm(None, 2)
# With two bytes per value, one rank of these groups takes 320, 120 and 160 bytes. Their largest ranks are 80, 20, 32.
GROUPS = [
    Group("a", ("a",), 80, (80,), ""),
    Group("b+c", ("b", "c"), 20, (20, 20), ""),
    Group("d", ("d",), 32, (48,), ""),
]
GAINS = {"a": [16.0, 1.0], "b+c": [4.0, 4.0], "d": [1.0, 0.25]}  # singular values 4 and 1, 2 and 2, 1 and 0.5
RATIOS = {"a": 0.1, "b+c": 0.3, "d": 0.2}


def allocate(
    method: str,
    *budgets: int,
    gains: Mapping[str, Sequence[float]] = GAINS,
    ratios: Mapping[str, float] = RATIOS,
) -> tuple[list[Entry], list[int]]:
    """Return the entry of a method for each budget, and the ranks at which the method solved."""
    solved_ranks = []

    def solve(method: Method, rank: int) -> Correction:
        solved_ranks.append(rank)
        factors = []
        for group in GROUPS:
            most = min(rank, group.in_features, sum(group.out_features))
            parts = zip(group.members, group.out_features, strict=True)
            lefts = {name: torch.zeros(width, most, dtype=torch.bfloat16) for name, width in parts}
            found = torch.tensor([*gains[group.name], *[0.0] * 64][:most], dtype=torch.float64)
            right = torch.zeros(most, group.in_features, dtype=torch.bfloat16)
            factors.append(GroupFactors(group, right, lefts, found, 30.0))
        base_model = {"name": "org/model", "revision": None, "fingerprint": ""}
        config = GlowQConfig(format="correction", base_model=base_model, groups=describe_groups(factors))
        return Correction(factors, config, {}, 10**6)

    context = BudgetContext(GROUPS, {f"{budget}B": budget for budget in budgets}, HALF, lambda: ratios)
    chosen = get_method(method)
    allocator = ALLOCATORS[chosen.allocation]
    size = allocator.size(chosen, context)
    whole = None if size is None or size.rank is None else solve(chosen, size.rank)
    return allocator.entries(chosen, context, whole), solved_ranks


def names(entry: Entry) -> list[str]:
    return [factors.group.name for factors in entry.factors]


@pytest.mark.parametrize(
    ("available", "rank"),
    [(10**6, 64), (14000, 64), (13999, 32), (8880, 32), (8879, 16), (4800, 16), (600, 2), (599, 1), (1, 1)],
)
def test_the_rank_is_halved_until_half_of_all_groups_fit_the_budget(available: int, rank: int) -> None:
    # All groups take 28000 bytes at 64 ranks, 17760 at 32, 9600 at 16, 1200 at 2.
    assert fixed_rank_within(GROUPS, available, HALF) == rank


def test_the_rank_is_one_that_some_group_allows() -> None:
    assert fixed_rank_within(GROUPS[1:2], 10**6, HALF) == 16


@pytest.mark.parametrize(
    ("method", "budget", "chosen", "size"),
    [
        ("glowq-s", 640, ["a"], 640),  # scores 5, 4 and 1.5; only the score counts, not the gain per byte
        ("glowq-s", 900, ["a", "b+c"], 880),
        ("glowq-s-ratio", 640, ["b+c", "d"], 560),
        ("glowq-s-ratio", 1199, ["b+c", "d"], 560),
    ],
)
def test_the_highest_scores_first(method: str, budget: int, chosen: list[str], size: int) -> None:
    (entry,), solved_ranks = allocate(method, budget)
    assert solved_ranks == [2]
    assert (names(entry), entry.factor_bytes, entry.rank, entry.reason) == (chosen, size, 2, None)
    assert [factors.rank for factors in entry.factors] == [2] * len(chosen)
    assert (entry.method, entry.allocation, entry.budget_bytes) == (method, "groups", budget)


def test_until_the_next_does_not_fit() -> None:
    (entry,), _ = allocate("glowq-s-ratio", 900, ratios={"a": 0.3, "d": 0.2, "b+c": 0.1})
    assert names(entry) == ["a"]  # "d" would need 960 bytes; "b+c" would fit, but comes after "d"


def test_one_solve_serves_every_budget_and_scores_are_of_its_own_rank() -> None:
    gains = {"a": [9.0, 0.0], "b+c": [4.0, 4.0], "d": [1.0, 0.0]}  # scores 3, 2, 1 at rank 1 and 3, 4, 1 at rank 2
    (small, large), solved_ranks = allocate("glowq-s", 400, 650, gains=gains)
    assert solved_ranks == [2]
    assert (names(small), small.rank, small.factor_bytes) == (["a"], 1, 320)
    assert (names(large), large.rank, large.factor_bytes) == (["b+c"], 2, 240)


def test_a_group_that_allows_less_has_what_it_allows() -> None:
    (entry,), _ = allocate("glowq-s", 10**6)
    assert entry.rank == 64
    assert {factors.group.name: factors.rank for factors in entry.factors} == {"a": 64, "b+c": 20, "d": 32}


@pytest.mark.parametrize(
    ("budget", "reason", "solves"),
    [
        (620, "rank 2 of the group of the highest score takes 640 bytes, more than the budget", [2]),
        (130, "rank 1 of the group of the highest score takes 320 bytes, more than the budget", [1]),
        (119, "one rank of the smallest group takes 120 bytes, more than the budget", []),
    ],
)
def test_a_budget_too_small_for_any_rank_says_why(budget: int, reason: str, solves: list[int]) -> None:
    (entry,), solved_ranks = allocate("glowq-s", budget)
    assert (entry.factors, entry.rank, entry.reason) == ((), None, reason)
    assert solved_ranks == solves


def even(*sizes: int) -> dict[str, list[float]]:
    """Gains for each group: `sizes[i]` equal squared singular values, which are the whole error of 30."""
    return {group.name: [30.0 / size] * size for group, size in zip(GROUPS, sizes, strict=True)}


def test_ranks_are_in_proportion_to_the_root_of_the_effective_rank_over_the_bytes() -> None:
    """Effective ranks 9, 1 and 4, bytes 320, 120 and 160: the weights are 0.168, 0.091 and 0.158."""
    (entry,), solved_ranks = allocate("d-rank", 3000, gains=even(9, 1, 4))
    assert solved_ranks == [20]  # 4 times the 5 ranks of all groups that 3,000 bytes hold
    # At 32.9 times the weights, 5.5, 3.0 and 5.2; the next rank would be the sixth of "a", for 320 bytes.
    assert {factors.group.name: factors.rank for factors in entry.factors} == {"a": 5, "b+c": 3, "d": 5}
    assert (entry.factor_bytes, entry.rank, entry.reason) == (2760, None, None)


def test_an_effective_rank_of_a_budget_too_small() -> None:
    (first, second), _ = allocate("d-rank", 100, 300, gains=even(1, 1, 1))
    assert (first.factors, first.reason) == ((), "the first rank takes more bytes than the budget")
    assert names(second) == ["b+c", "d"]
    (none,), solved_ranks = allocate("d-rank", 119)
    assert (none.factors, none.reason, solved_ranks) == ((), "the first rank takes more bytes than the budget", [])
