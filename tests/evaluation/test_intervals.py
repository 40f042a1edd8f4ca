"""Intervals of a mean, against tables and against what they promise."""

from __future__ import annotations

import math

import pytest
import torch

from glowq.evaluation.intervals import bootstrap, mean_interval

TABLE = {3: 4.3027, 5: 2.7764, 8: 2.3646, 16: 2.1314, 64: 1.9983, 1000: 1.9623}  # values -> t of a table, one less


@pytest.mark.parametrize("count", TABLE)
def test_the_width_is_that_of_a_table(count: int) -> None:
    values = torch.arange(count, dtype=torch.float64)
    found = mean_interval(values)
    expected = TABLE[count] * float(values.std()) / math.sqrt(count)
    assert found.high - found.value == pytest.approx(expected, rel=0.03 if count < 5 else 2e-3)
    assert found.value - found.low == pytest.approx(found.high - found.value)


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_values_say_nothing(count: int) -> None:
    found = mean_interval(torch.ones(count, dtype=torch.float64))
    assert (found.value, found.low, found.high) == (1.0, -math.inf, math.inf)


def test_it_holds_the_mean_95_times_in_100() -> None:
    values = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    held = sum(found.low <= 0 <= found.high for found in map(mean_interval, values)) / len(values)
    assert 0.93 < held < 0.97


def held(count: int, draws: int) -> float:
    """How often the interval of a ratio of two means, of `count` sequences, holds the true ratio."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(draws):
        columns = torch.randn(count, 2, generator=generator, dtype=torch.float64) * 0.2 + torch.tensor([2.0, 1.0])
        found = bootstrap(lambda means: means[..., 0] / means[..., 1], columns, resamples=1000, seed=seed)
        hits += found.low <= 2.0 <= found.high
    return hits / draws


@pytest.mark.parametrize("count", [8, 16])
def test_a_bootstrap_of_few_sequences_holds_the_figure_as_often_as_it_says(count: int) -> None:
    """Of 1000 intervals 95% are 950 +- 7; the plain percentiles of 8 sequences hold it 870 times."""
    assert 0.92 < held(count, 1000) < 0.98


@pytest.mark.long
@pytest.mark.parametrize("count", [8, 12, 16, 32, 64, 200])
def test_a_bootstrap_holds_the_figure_as_often_as_it_says(count: int) -> None:
    assert 0.925 < held(count, 4000) < 0.965


@pytest.mark.parametrize("count", [1, 7])
def test_a_bootstrap_of_too_few_sequences_says_nothing(count: int) -> None:
    found = bootstrap(lambda means: means[..., 0], torch.ones(count, 1, dtype=torch.float64))
    assert (found.value, found.low, found.high) == (1.0, -math.inf, math.inf)
