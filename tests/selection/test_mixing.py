"""The division of a budget between ranks and bits, compared with all divisions of small cases."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glowq.selection.allocation import GroupGains, Step
from glowq.selection.mixing import Division, divide
from support.gains import few, gains_of

AMOUNTS = st.floats(0.0, 10.0, allow_nan=False)
GROUPS = st.lists(
    st.tuples(st.lists(AMOUNTS, min_size=1, max_size=4), AMOUNTS, st.integers(1, 40)), min_size=1, max_size=4
)
RANK_BYTES = 4


def case(groups: list[tuple[list[float], float, int]]) -> tuple[list[GroupGains], dict[str, Step]]:
    ranks = gains_of([sorted(gains, reverse=True) for gains, _, _ in groups], [RANK_BYTES] * 4, [100] * 4)
    names = [item.group.name for item in ranks]
    return ranks, {name: Step(name, 1, added, gain) for name, (_, gain, added) in zip(names, groups, strict=True)}


def gain_of(found: Division, ranks: list[GroupGains], wider: dict[str, Step], available: int) -> float:
    """What a division gains, if the best ranks of the other groups take all bytes that the bits leave."""
    left = (available - found.wider_bytes) // RANK_BYTES
    gains = sorted((g for item in ranks if item.group.name not in found.wider for g in item.gains), reverse=True)
    return math.fsum(gains[:left]) + math.fsum(wider[name].gain for name in found.wider)


@few
@given(groups=GROUPS, available=st.integers(0, 100))
def test_it_fits_and_loses_at_most_one_choice_to_the_best(
    groups: list[tuple[list[float], float, int]], available: int
) -> None:
    ranks, wider = case(groups)
    found = divide(ranks, wider, available)
    assert found.wider_bytes == sum(wider[name].bytes for name in found.wider)
    assert found.wider_bytes + found.rank_bytes <= available
    best = 0.0
    for chosen in product([False, True], repeat=len(wider)):
        names = frozenset(name for name, taken in zip(wider, chosen, strict=True) if taken)
        taken = sum(wider[name].bytes for name in names)
        if taken <= available:
            best = max(best, gain_of(Division(names, taken, 0), ranks, wider, available))
    largest = max([step.gain for step in wider.values()] + [math.fsum(item.gains) for item in ranks])
    assert gain_of(found, ranks, wider, available) >= best - largest - 1e-9


def test_each_byte_goes_where_it_gains_more() -> None:
    ranks, wider = case([([9.0, 5.0], 6.0, 4), ([1.0, 0.5], 8.0, 8), ([3.0, 0.1], 2.0, 40)])
    first, second, third = (item.group.name for item in ranks)
    assert divide(ranks, wider, 3) == Division(frozenset(), 0, 0)
    assert divide(ranks, wider, 4) == Division(frozenset(), 0, 4)  # the first rank: 9 for 4 bytes
    assert divide(ranks, wider, 20) == Division(frozenset({second}), 8, 12)
    everything = divide(ranks, wider, 10_000)
    assert everything == Division(frozenset({second}), 8, 16)
    assert first not in everything.wider
    assert third not in everything.wider


def test_bits_that_gain_nothing_are_not_bought() -> None:
    ranks, wider = case([([0.0], -1.0, 4), ([0.0], 0.0, 4)])
    assert divide(ranks, wider, 1000) == Division(frozenset(), 0, 0)


@pytest.mark.parametrize("available", [0, 1, 3])
def test_too_few_bytes_for_anything(available: int) -> None:
    ranks, wider = case([([9.0], 9.0, 4)])
    assert divide(ranks, wider, available) == Division(frozenset(), 0, 0)
