"""The ranks that a budget gives, compared with every possible choice of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glowq.errors import ConfigError, RankError
from glowq.selection.allocation import GroupGains
from glowq.selection.budget import RankRequest
from glowq.selection.ranks import choose_ranks
from support.gains import allowed, few, gains_of


def choices(group_gains: list[GroupGains], step: int, cap: int | None) -> Iterator[tuple[int, float]]:
    """Yield (bytes, gain) of every possible choice of ranks."""
    rank_lists = [
        [0, *allowed(len(item.gains), min(item.group.in_features, *item.group.out_features), step, cap)]
        for item in group_gains
    ]
    for ranks in product(*rank_lists):
        pairs = list(zip(group_gains, ranks, strict=True))
        yield sum(o.rank_bytes * rank for o, rank in pairs), sum(sum(o.gains[:rank]) for o, rank in pairs)


def totals(group_gains: list[GroupGains], ranks: dict[str, int]) -> tuple[int, float]:
    """Return (bytes, gain) of one choice of ranks."""
    pairs = [(item, ranks.get(item.group.name, 0)) for item in group_gains]
    return sum(o.rank_bytes * rank for o, rank in pairs), sum(sum(o.gains[:rank]) for o, rank in pairs)


@st.composite
def cases(draw: st.DrawFn, equal: bool = False) -> tuple[list[GroupGains], int, int | None]:
    """Draw up to three groups with their gains, a rank step, and a largest rank or None.

    The gains are integers, so that their sums are exact. With `equal`, one rank takes the same bytes in every group.
    """
    count = draw(st.integers(1, 3))
    gains = [sorted(draw(st.lists(st.integers(0, 20), min_size=1, max_size=7)), reverse=True) for _ in range(count)]
    equal_bytes = draw(st.integers(1, 9))
    rank_bytes = [equal_bytes if equal else draw(st.integers(1, 9)) for _ in range(count)]
    step = draw(st.integers(1, 4))
    # Steps take equal bytes in all groups only if no shape's largest rank lies between two multiples of the step.
    largest = [draw(st.sampled_from([100, 100 if equal else len(gain)])) for gain in gains]
    return gains_of(gains, rank_bytes, largest), step, draw(st.one_of(st.none(), st.integers(4, 8)))


class TestChoice:
    @few
    @given(case=cases(), available=st.integers(1, 120))
    def test_bytes(self, case: tuple[list[GroupGains], int, int | None], available: int) -> None:
        group_gains, step, cap = case
        request = RankRequest(budget=available, rank_step=step, max_rank=cap)
        every = list(choices(group_gains, step, cap))
        gaining = [pair for pair in every if pair[1] > 0]
        if not gaining:
            refused_or_nothing(group_gains, request)
            return
        if all(cost > available for cost, _ in gaining):
            with pytest.raises(ConfigError, match="of the smallest group takes"):
                choose_ranks(group_gains, request, 1000, 0.0)
            return
        ranks = choose_ranks(group_gains, request, 1000, 0.0)
        used, gain = totals(group_gains, ranks)
        assert used <= available
        for item in group_gains:
            possible = allowed(len(item.gains), min(item.group.in_features, *item.group.out_features), step, cap)
            rank = ranks.get(item.group.name, 0)
            assert rank == 0 or rank in possible
            further = [more for more in possible if more > rank]
            if further:  # the next ranks gain nothing, or do not fit
                more = sum(item.gains[rank : further[0]])
                assert more == 0 or (further[0] - rank) * item.rank_bytes > available - used
        # The greedy choice may leave the last bytes unused. The best choice gains at most one largest step more.
        steps = [
            sum(item.gains[start : start + step]) for item in group_gains for start in range(0, len(item.gains), step)
        ]
        assert max(found for cost, found in every if cost <= available) <= gain + max(steps)

    @few
    @given(case=cases(equal=True), chosen=st.integers(1, 12))
    def test_at_equal_rank_bytes_no_other_choice_gains_more(
        self, case: tuple[list[GroupGains], int, int | None], chosen: int
    ) -> None:
        group_gains, step, cap = case
        available = chosen * step * group_gains[0].rank_bytes
        every = list(choices(group_gains, step, cap))
        if max(gain for _, gain in every) == 0:
            return
        ranks = choose_ranks(group_gains, RankRequest(budget=available, rank_step=step, max_rank=cap), 1000, 0.0)
        assert totals(group_gains, ranks)[1] == max(found for cost, found in every if cost <= available)

    @few
    @given(case=cases(), percent=st.integers(1, 99))
    def test_a_target(self, case: tuple[list[GroupGains], int, int | None], percent: int) -> None:
        group_gains, step, cap = case
        total = 1.25 * sum(sum(item.gains) for item in group_gains)
        request = RankRequest(budget=f"recover {percent}%", rank_step=step, max_rank=cap)
        every = list(choices(group_gains, step, cap))
        wanted = percent / 100 * total
        if max(gain for _, gain in every) < wanted or total == 0:
            with pytest.raises(ConfigError, match=r"out of reach|no group holds|nothing to recover"):
                choose_ranks(group_gains, request, 1000, total)
            return
        ranks = choose_ranks(group_gains, request, 1000, total)
        used, gain = totals(group_gains, ranks)
        assert gain >= wanted
        fewest = min(cost for cost, found in every if found >= wanted)
        assert fewest <= used < fewest + step * max(item.rank_bytes for item in group_gains)

    @few
    @given(case=cases(equal=True), percent=st.integers(1, 99))
    def test_at_equal_rank_bytes_no_other_choice_reaches_it_with_less(
        self, case: tuple[list[GroupGains], int, int | None], percent: int
    ) -> None:
        group_gains, step, cap = case
        every = list(choices(group_gains, step, cap))
        total = max(gain for _, gain in every)
        if total == 0:
            return
        request = RankRequest(budget=f"recover {percent}%", rank_step=step, max_rank=cap)
        used, _ = totals(group_gains, choose_ranks(group_gains, request, 1000, total))
        assert used == min(cost for cost, found in every if found >= percent / 100 * total)

    @few
    @given(case=cases(), percent=st.integers(1, 99))
    def test_the_bytes_of_a_target_give_the_same_ranks(
        self, case: tuple[list[GroupGains], int, int | None], percent: int
    ) -> None:
        group_gains, step, cap = case
        limits: dict[str, Any] = {"rank_step": step, "max_rank": cap}
        total = max(gain for _, gain in choices(group_gains, step, cap))
        if total == 0:
            return
        ranks = choose_ranks(group_gains, RankRequest(budget=f"recover {percent}%", **limits), 1000, total)
        assert (
            choose_ranks(group_gains, RankRequest(budget=totals(group_gains, ranks)[0], **limits), 1000, total) == ranks
        )

    def test_ranks_go_where_the_gains_are(self) -> None:
        group_gains = gains_of([[9, 8, 7, 1], [2, 1, 0, 0]], [64, 64], [8, 8])

        def ranks(budget: int, **limits: int) -> dict[str, int]:
            return choose_ranks(group_gains, RankRequest(budget=budget, **limits), 10_000, 30)

        assert ranks(4 * 64) == {"g0": 3, "g1": 1}
        assert ranks(4 * 64, max_rank=2) == {"g0": 2, "g1": 2}
        assert ranks(4 * 64, rank_step=2) == {"g0": 4}
        assert ranks(4 * 64, rank_step=2, max_rank=3) == {"g0": 2, "g1": 2}
        assert ranks(2 * 64) == {"g0": 2}
        assert ranks(99 * 64) == {"g0": 4, "g1": 2}  # ranks that gain nothing get no bytes

    def test_a_shape_that_ends_between_two_multiples_may_be_used_up(self) -> None:
        group_gains = gains_of([[9, 8, 7, 6, 5], [4, 4, 4, 4, 4]], [1, 1], [5, 8])
        assert choose_ranks(group_gains, RankRequest(budget=99, rank_step=4), 100, 60) == {"g0": 5, "g1": 4}
        assert choose_ranks(group_gains, RankRequest(budget=99, rank_step=4, max_rank=4), 100, 60) == {"g0": 4, "g1": 4}
        assert choose_ranks(group_gains, RankRequest(budget=99, rank_step=8), 100, 60) == {"g0": 5}

    def test_a_uniform_cut(self) -> None:
        group_gains = gains_of([[9, 8, 7], [1]], [1, 1], [8, 8])
        assert choose_ranks(group_gains, RankRequest(rank=2), 100, 60) == {"g0": 2, "g1": 1}
        assert choose_ranks(group_gains, RankRequest(), 100, 60) == {"g0": 3, "g1": 1}
        with pytest.raises(RankError, match="rank must be at least 1, found 0"):
            choose_ranks(group_gains, RankRequest(rank=0), 100, 60)


def refused_or_nothing(group_gains: list[GroupGains], request: RankRequest) -> None:
    """Assert that the choice is empty if no rank gains anything; otherwise every group has fewer ranks than a step."""
    if any(gain for item in group_gains for gain in item.gains):
        with pytest.raises(ConfigError, match="no group holds"):
            choose_ranks(group_gains, request, 1000, 0.0)
    else:
        assert choose_ranks(group_gains, request, 1000, 0.0) == {}
