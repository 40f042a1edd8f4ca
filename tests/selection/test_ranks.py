"""Parsing of budgets and targets, and the ranks that they give."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glowq.errors import ConfigError, RankError
from glowq.factors.form import FactorForm
from glowq.selection.budget import RankRequest, parse_budget, parse_target
from glowq.selection.ranks import candidate_ranks, choose_ranks, uniform_ranks
from support.gains import allowed, few, gains_of, groups_of


@pytest.mark.parametrize(
    ("budget", "size"),
    [
        ("1%", 1_000),
        ("1.5%", 1_500),
        ("100 %", 100_000),
        ("0.7%", 700),
        ("0.007%", 7),
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
        (f"{10**40}B", 10**40),
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


@pytest.mark.parametrize(
    ("budget", "share"),
    [("recover 80%", 0.8), ("Recover80%", 0.8), (" RECOVER  0.5 % ", 0.005), ("recover 99.9%", 0.999)],
)
def test_targets(budget: str, share: float) -> None:
    assert parse_target(budget) == pytest.approx(share)
    with pytest.raises(ConfigError, match="is neither a share"):
        parse_budget(budget, 100_000)


@pytest.mark.parametrize("budget", ["80%", "200MB", 4096, "much", "80% recover"])
def test_what_is_no_target_is_left_to_bytes(budget: str | int) -> None:
    assert parse_target(budget) is None


@pytest.mark.parametrize(
    "budget", ["recover", "recover 80", "recover 0%", "recover 100%", "recover -5%", "recover much", "recover 80%%"]
)
def test_a_target_outside_its_range_is_refused(budget: str) -> None:
    with pytest.raises(ConfigError, match=r"expected 'recover' and a share .* above 0% and below 100%"):
        RankRequest(budget=budget)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"rank": 4, "budget": "1%"}, "either rank or budget"),
        ({"rank": 4, "rank_step": 8}, "give a budget with them"),
        ({"rank": 4, "max_rank": 8}, "give a budget with them"),
        ({"rank_step": 8}, "give a budget with them"),
        ({"budget": "1%", "rank_step": 0}, "rank_step must be a whole number of at least 1, found 0"),
        ({"budget": "1%", "rank_step": 8.0}, "rank_step must be a whole number"),
        ({"budget": "1%", "rank_step": True}, "rank_step must be a whole number"),
        ({"budget": "1%", "rank_step": None}, "rank_step must be a whole number"),
        ({"budget": "1%", "max_rank": 0}, "max_rank must be a whole number of at least 1, found 0"),
        ({"budget": "1%", "rank_step": 16, "max_rank": 8}, "max_rank 8 is below one rank_step of 16"),
        ({"budget": "much"}, "is neither a share"),
    ],
)
def test_requests_that_cannot_be_met(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RankRequest(**request_)


def test_one_rank_for_all_as_far_as_a_group_allows() -> None:
    groups = groups_of([(9, 9), (3, 8)])
    assert uniform_ranks(groups, 5) == {"g0": 5, "g1": 3}
    with pytest.raises(RankError, match="between 1 and 9 for this model, found 10"):
        uniform_ranks(groups, 10)


HALF = FactorForm(None, 2)  # two bytes per value


class TestCandidates:
    groups = groups_of([(64, 64), (512, 512)])

    def ranks(self, budget: str | int, **limits: Any) -> dict[str, int]:
        return candidate_ranks(self.groups, RankRequest(budget=budget, **limits), 10**6, HALF, shared=True)

    def test_they_leave_room_to_choose_and_cost_no_more_than_the_budget_alone(self) -> None:
        assert self.ranks(3_000) == {"g0": 11, "g1": 1}
        assert self.ranks(1_000) == {"g0": 3}
        assert self.ranks(23_040) == {"g0": 64, "g1": 11}  # an even division gives rank 10 to each

    def test_they_are_whole_steps_below_the_largest_rank(self) -> None:
        assert self.ranks(23_040, rank_step=8) == {"g0": 64, "g1": 8}
        assert self.ranks(23_040, rank_step=7) == {"g0": 64, "g1": 7}
        assert self.ranks(23_040, rank_step=8, max_rank=20) == {"g0": 16, "g1": 8}
        assert self.ranks(23_040, max_rank=20) == {"g0": 20, "g1": 11}
        assert self.ranks(23_040, rank_step=80) == {"g0": 64}

    def test_a_target_is_solved_for_as_a_tenth_of_the_weights_is(self) -> None:
        assert self.ranks("recover 1%") == self.ranks("recover 99%") == {"g0": 64, "g1": 512}
        assert candidate_ranks(self.groups, RankRequest(budget="recover 9%"), 100, HALF, shared=True) == {
            "g0": 8,
            "g1": 8,
        }

    @few
    @given(
        shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
        budget=st.one_of(st.integers(1, 5_000), st.just("recover 50%")),
        step=st.integers(1, 20),
        cap=st.one_of(st.none(), st.integers(20, 40)),
        shared=st.booleans(),
    )
    def test_every_rank_is_possible_and_a_budget_for_one_rank_has_candidates(
        self, shapes: list[tuple[int, int]], budget: Any, step: int, cap: int | None, shared: bool
    ) -> None:
        groups = groups_of(shapes)
        most = {f"g{i}": min(shape) for i, shape in enumerate(shapes)}
        rank_bytes = {f"g{i}": 2 * sum(shape) for i, shape in enumerate(shapes)}
        request = RankRequest(budget=budget, rank_step=step, max_rank=cap)
        if budget != "recover 50%" and budget < min(rank_bytes[name] * min(step, most[name]) for name in most):
            with pytest.raises(ConfigError, match="of the smallest group takes"):
                candidate_ranks(groups, request, 10**4, HALF, shared=shared)
            return
        ranks = candidate_ranks(groups, request, 10**4, HALF, shared=shared)
        assert ranks
        for name, rank in ranks.items():
            assert rank in allowed(most[name], most[name], step, cap)
            assert budget == "recover 50%" or rank * rank_bytes[name] <= budget


class TestRefused:
    group_gains = gains_of([[3, 1], [5, 4, 0]], [70, 140], [30, 30])

    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            (
                {"budget": "0.5%"},
                r"'0.5%' is 50 bytes, but one rank of the .* takes 70 bytes \(0\.70%\); give at least",
            ),
            ({"budget": 139, "rank_step": 2}, r"139 bytes, but one step of 2 ranks .* takes 140 bytes \(1\.40%\)"),
            ({"budget": 139, "rank_step": 3}, r"one step of 3 ranks .* takes 420 bytes"),
            ({"budget": "1%", "rank_step": 4}, r"no group holds the 4 ranks of one rank_step \(the largest has 3\)"),
            (
                {"budget": "recover 80%"},
                r"'recover 80%' is out of reach: .* at most a predicted 65\.0% .* larger budget",
            ),
            ({"budget": "recover 50%", "max_rank": 1}, r"at most a predicted 40\.0%"),
        ],
    )
    def test_with_what_would_do(self, request_: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            choose_ranks(self.group_gains, RankRequest(**request_), 10_000, 20)

    @pytest.mark.parametrize("base_bytes", [9_999, 10_000, 10_001, 123_457])
    def test_the_share_named_is_enough(self, base_bytes: int) -> None:
        with pytest.raises(ConfigError) as refused:
            choose_ranks(self.group_gains, RankRequest(budget=1), base_bytes, 20)
        share = str(refused.value).partition("(")[2].partition(")")[0]
        assert choose_ranks(self.group_gains, RankRequest(budget=share), base_bytes, 20)

    def test_a_target_of_nothing(self) -> None:
        with pytest.raises(ConfigError, match="nothing to recover"):
            choose_ranks(gains_of([[0, 0]], [1], [8]), RankRequest(budget="recover 50%"), 100, 0.0)

    def test_before_anything_is_solved(self) -> None:
        groups, request = groups_of([(30, 30), (15, 20)]), RankRequest(budget="5.5%", rank_step=8)
        with pytest.raises(ConfigError, match=r"one step of 8 ranks of the smallest group takes 560 bytes \(5\.60%\)"):
            candidate_ranks(groups, request, 10_000, HALF, shared=True)


@pytest.mark.parametrize("budget", ["0.02", 0.02])
def test_a_share_without_its_sign_is_told_how_it_is_written(budget: object) -> None:
    with pytest.raises(ConfigError, match=r"is less than one byte; a share is written with %: '2%'"):
        parse_budget(budget, 1000)  # type: ignore[arg-type]
