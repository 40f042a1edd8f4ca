"""What longer calibration text would give, compared with dense float64 computations and with known distributions."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import glowq
from glowq.calibration.text_gap import TextGap, lost_to_sampling, text_gap
from glowq.solving.low_rank import factorize
from glowq.solving.methods.base import get_method
from glowq.solving.moments import Moments
from support.tiny import EXAMPLE, quantized

RANK = 4


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(x: Tensor) -> Moments:
    second = x.T @ x / len(x)
    return Moments(len(x), second=second, mean_square=second.diagonal().mean())


def spread(width: int) -> Tensor:
    """A square root of an input moment whose eigenvalues fall as 1/k."""
    return torch.linalg.qr(values(width, width, seed=7))[0] * torch.arange(1, width + 1).double() ** -0.5


def removed(error: Tensor, left: Tensor, right: Tensor, second: Tensor, output: Tensor) -> float:
    """trace(G E S E^T) - trace(G (E - AB) S (E - AB)^T)."""
    rest = error - left @ right
    return float(torch.trace(output @ (error @ second @ error.T - rest @ second @ rest.T)))


def test_gains_on_both_halves_are_those_of_dense_algebra() -> None:
    error, inputs = values(24, 16), values(60, 16, seed=1) @ spread(16).T
    root = values(24, 40, seed=2)
    output = root @ root.T / 40
    first, rest = inputs[:25], inputs[25:]
    whole = replace(moments_of(inputs), output=output)
    found = text_gap(error, moments_of(first), whole, RANK, seed=0)
    damped = output + 0.1 * output.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    own, other = torch.zeros(RANK, dtype=torch.float64), torch.zeros(RANK, dtype=torch.float64)
    for half, opposite in ((first, rest), (rest, first)):
        factors = factorize(error, half.T @ half / len(half), RANK, output_moment=output)
        left, right = factors.left.double(), factors.right.double()
        for rank in range(RANK):
            for sums, text in ((own, half), (other, opposite)):
                second = text.T @ text / len(text)
                sums[rank] += removed(error, left[:, : rank + 1], right[: rank + 1], second, damped) / 2
    assert torch.allclose(found.own.cumsum(0), own, rtol=1e-5)
    assert torch.allclose(found.other.cumsum(0), other, rtol=1e-5)


@pytest.mark.parametrize("tokens", [64, 256])
def test_what_endless_text_would_add_is_foretold(tokens: int) -> None:
    """Inputs of a known distribution: the factors of endless text are those of its exact moment."""
    error, root = values(32, 32), spread(32)
    exact, method = root @ root.T, get_method("glowq-one-sided")
    best = float(
        method.solve(error, Moments(1, second=exact, mean_square=exact.diagonal().mean()), RANK, 0).gains.sum()
    )
    identity = torch.eye(32, dtype=torch.float64)
    foretold, lost = [], []
    for seed in range(40):
        inputs = values(tokens, 32, seed=100 + seed) @ root.T
        gap = text_gap(error, moments_of(inputs[: tokens // 2]), moments_of(inputs), RANK, 0)
        found = lost_to_sampling({"group": gap}, {"group": RANK})
        assert found is not None
        foretold.append(found[0])
        factors = method.solve(error, moments_of(inputs), RANK, 0)
        kept = removed(error, factors.left.double(), factors.right.double(), exact, identity)
        lost.append(best / kept - 1)
    assert 0.5 < sum(foretold) / sum(lost) < 2
    assert sum(lost) > 0.4 * 64 / tokens  # there is something to foretell


def test_only_the_ranks_that_are_kept_count() -> None:
    gaps = {
        "a": TextGap(torch.tensor([4.0, 1.0]).double(), torch.tensor([3.0, -1.0]).double()),
        "b": TextGap(torch.tensor([4.0]).double(), torch.tensor([4.0]).double()),
    }
    assert lost_to_sampling(gaps, {"a": 1, "b": 1}) == (1 / (8 + 3 * 7), 7 / 8)
    assert lost_to_sampling(gaps, {"a": 1}) == (1 / (4 + 3 * 3), 3 / 4)
    assert lost_to_sampling(gaps, {}) is None
    assert lost_to_sampling({}, {"a": 1}) is None


@pytest.mark.parametrize(("tokens", "said"), [(1024, True), (16384, False)])
def test_few_tokens_are_said_to_be_few(tokens: int, said: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = quantized(EXAMPLE, "torchao-int3"), AutoTokenizer.from_pretrained(EXAMPLE)
    options = {"calibration_tokens": tokens, "sequence_length": 128, "rank": 16, "force": True}
    with caplog.at_level(logging.WARNING, logger="glowq"):
        glowq.correct(model, reference=EXAMPLE, tokenizer=tokenizer, calibration="python-stdlib", **options)
    lines = [record.getMessage() for record in caplog.records if "longer calibration text" in record.getMessage()]
    assert len(lines) == said
    assert all("factors that are solved with one half of these 896 tokens keep" in line for line in lines)
