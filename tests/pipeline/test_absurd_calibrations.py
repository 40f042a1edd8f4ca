"""Calibration text that nobody should use: a correction made of it may be useless, but never makes a model worse."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import glowq
from glowq.data.text import read_texts
from glowq.data.tokens import token_sequences
from glowq.evaluation.scores import Score, perplexity, score_models
from support.tiny import EXAMPLE, load, quantized

HARM = 1.002  # largest perplexity over that of the quantized model
LENGTH = 128
METHODS = ("glowq", "glowq-one-sided", "glowq-published")


@cache
def text(name: str, sequences: int) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    return token_sequences(read_texts(name), tokenizer, length=LENGTH, limit=sequences * LENGTH, seed=0)


def repeated(tokens: list[int], count: int) -> Tensor:
    return torch.tensor(tokens).repeat(-(-count // len(tokens)))[:count].reshape(-1, min(count, LENGTH))


def calibrations() -> dict[str, tuple[Any, int]]:
    """Name -> function that returns token ids, and the rank."""
    random = torch.randint(0, 4096, (8, LENGTH), generator=torch.Generator().manual_seed(0))
    few = {f"{n}-tokens-rank-{r}": (lambda n=n: text("python-stdlib", 1)[:, :n], r) for n, r in FEW}
    one = {f"one-token-{n}-times-rank-{r}": (lambda n=n: repeated([1234], n), r) for n, r in ONE}
    return {
        **few,
        **one,
        "first-token-512-times": (lambda: repeated([0], 512), 32),
        "two-tokens-512-times": (lambda: repeated([1234, 77], 1024), 64),
        "three-tokens-by-turns": (lambda: repeated([5, 1234, 77], 1024), 64),
        "ten-tokens-by-turns": (lambda: repeated(text("python-stdlib", 1)[0, :10].tolist(), 1024), 64),
        "one-sequence-8-times": (lambda: text("python-stdlib", 1).repeat(8, 1), 64),
        "one-sequence-32-times": (lambda: text("python-stdlib", 1).repeat(32, 1), 64),
        "random-tokens": (lambda: random, 64),
        "random-tokens-of-few": (lambda: random % 16, 64),
        "all-tokens-in-order": (lambda: torch.arange(1024).reshape(8, LENGTH), 64),
        "last-tokens-in-order": (lambda: torch.arange(3072, 4096).reshape(8, LENGTH), 64),
        "text-backwards": (lambda: text("python-stdlib", 4).flip(1), 64),
        "sorted-text": (lambda: text("python-stdlib", 4).sort(1).values, 64),
    }


FEW = ((6, 3), (12, 3), (12, 6), (32, 16), (64, 32), (128, 64))
ONE = ((16, 8), (128, 4), (128, 64), (1024, 4), (1024, 64), (4096, 64))
CALIBRATIONS = calibrations()
SHORT = ("12-tokens-rank-6", "one-token-1024-times-rank-64", "first-token-512-times")


@cache
def plain(base: str) -> tuple[Any, Tensor, Score]:
    """Reference, held-out text, and the quantized model's score on it."""
    reference, held = load(EXAMPLE, dtype=torch.float32), text("python-stdlib:held-out", 48)
    model = quantized(EXAMPLE, base, dtype=torch.float32)
    return reference, held, score_models({"reference": reference, base: model}, held)[base]


def rows() -> list[Any]:
    """Every base, method and calibration. The few that once made a model worst are not marked `long`."""
    found = []
    for base, method, name in product(("torchao-int3", "nf4"), METHODS, CALIBRATIONS):
        short = (base, method) == ("torchao-int3", "glowq") and name in SHORT
        found.append(pytest.param(base, method, name, marks=[] if short else pytest.mark.long))
    return found


def test_the_table_is_as_large_as_it_claims() -> None:
    assert len(rows()) == 24 * 3 * 2


@pytest.mark.parametrize(("base", "method", "calibration"), rows())
def test_it_never_makes_a_model_worse(base: str, method: str, calibration: str) -> None:
    reference, held, before = plain(base)
    ids, rank = CALIBRATIONS[calibration]
    model = quantized(EXAMPLE, base, dtype=torch.float32)
    glowq.correct(model, reference=reference, calibration=ids(), rank=rank, method=method)
    after = score_models({"reference": reference, "model": model}, held)["model"]
    found = perplexity(after) / perplexity(before), float(after.kl.mean() / before.kl.mean())
    assert max(found) < HARM, found
