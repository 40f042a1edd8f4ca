"""The effective rank, compared with a dense singular value decomposition."""

from __future__ import annotations

import math

import pytest
import torch

from glowq.selection.effective_rank import effective_rank


def test_of_all_singular_values_it_is_the_exponential_of_their_entropy() -> None:
    error = torch.randn(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares = torch.linalg.svdvals(error).square()
    shares = squares / squares.sum()
    expected = math.exp(-float((shares * shares.log()).sum()))
    assert effective_rank(squares, float(squares.sum()), 7) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("solved", [1, 3, 8])
def test_what_was_not_solved_is_spread_evenly(solved: int) -> None:
    even = torch.full((solved,), 2.0, dtype=torch.float64)
    assert effective_rank(even, 16.0, 8) == pytest.approx(8.0, rel=1e-12)


def test_its_ends() -> None:
    assert effective_rank(torch.tensor([5.0, 0.0]), 5.0, 9) == 1.0
    assert effective_rank(torch.tensor([0.0, 0.0]), 0.0, 9) == 1.0
