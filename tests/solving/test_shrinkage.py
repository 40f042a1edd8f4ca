"""Shrinkage of output moments, compared with dense float64 algebra and with the true moment of the samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glowq.data.text import read_texts
from glowq.data.tokens import token_sequences
from glowq.solving.moments import LowRankMoment
from glowq.solving.shrinkage import effective_tokens, shrunk

WIDTH = 48


def true_moment() -> Tensor:
    """A moment whose eigenvalues fall as 1 / k, float64."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))[0]
    return basis @ torch.diag(1 / torch.arange(1, WIDTH + 1, dtype=torch.float64)) @ basis.T


def sampled(count: int, seed: int) -> Tensor:
    root = torch.linalg.cholesky(true_moment())
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) @ root.T
    return rows.T @ rows / count


def dense(moment: LowRankMoment) -> Tensor:
    return moment.diagonal.diag() + moment.factor @ moment.factor.T


@pytest.mark.parametrize("count", [4, 16, 64, 256])
def test_it_is_nearer_to_the_true_moment_than_the_samples_are(count: int) -> None:
    before, after = 0.0, 0.0
    for seed in range(20):
        moment = sampled(count, seed)
        before += float((moment - true_moment()).square().sum())
        after += float((shrunk(moment, count) - true_moment()).square().sum())
    assert after < before


def test_one_token_leaves_the_identity_and_many_tokens_leave_the_moment() -> None:
    moment = sampled(1, 0)
    torch.testing.assert_close(shrunk(moment, 1), moment.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64))
    moment = sampled(100_000, 0)
    assert float((shrunk(moment, 100_000) - moment).norm() / moment.norm()) < 1e-2


@pytest.mark.parametrize("tokens", [1.0, 7.5, 300.0])
def test_the_trace_stays_and_the_moment_stays_positive(tokens: float) -> None:
    moment = sampled(12, 1)
    found = shrunk(moment, tokens)
    assert float(found.trace()) == pytest.approx(float(moment.trace()), rel=1e-12)
    assert float(torch.linalg.eigvalsh(found)[0]) > -1e-12
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("tokens", [1.0, 7.5, 300.0])
def test_a_low_rank_moment_is_shrunk_as_the_matrix_that_it_stands_for(tokens: float) -> None:
    generator = torch.Generator().manual_seed(2)
    diagonal = torch.rand(WIDTH, generator=generator, dtype=torch.float64)
    factor = torch.randn(WIDTH, 5, generator=generator, dtype=torch.float64)
    moment = LowRankMoment(diagonal, factor)
    found = shrunk(moment, tokens)
    assert isinstance(found, LowRankMoment)
    assert bool((found.diagonal >= 0).all())
    expected = shrunk(dense(moment), tokens)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(dense(found), expected)


@pytest.mark.parametrize("name", ["python-stdlib", "python-stdlib:held-out"])
def test_ordinary_text_counts_in_full(name: str, tokenizer: Any) -> None:
    ids = token_sequences(read_texts(name), tokenizer, length=512, limit=8192, seed=0)
    for count in (1, 2, 4, 8, 16):
        assert effective_tokens(ids[:count]) == count * 512


def test_repeated_tokens_count_as_few(token_ids: Tensor) -> None:
    assert effective_tokens(torch.full((4, 256), 7)) < 1
    assert effective_tokens(torch.tensor([3, 5]).repeat(512)) < 1
    assert effective_tokens(torch.arange(1000)) == 1000
    assert effective_tokens(token_ids) == effective_tokens(token_ids.repeat(8, 1))
