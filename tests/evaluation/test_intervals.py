"""Intervals of a mean, against tables and against what they promise."""

from __future__ import annotations

import math

import pytest
import torch

from glowq.evaluation.intervals import mean_interval

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
