"""Comparison of methods at equal bytes from Python: paired scores, one solve for all budgets, no overlapping text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import glowq
from glowq.data.overlap import WINDOW, check_disjoint, find_overlap
from glowq.data.text import read_texts
from glowq.data.tokens import token_sequences
from glowq.errors import EvaluationError
from glowq.evaluation.scores import perplexity, score_models
from glowq.factors.form import FactorForm
from glowq.factors.group import Group
from glowq.factors.rounding import round_group
from glowq.pipeline.compare.budgets import Entry, uniform_rank_within
from glowq.pipeline.compare.comparison import Comparison, compare_methods, distill_entries, score_entries
from glowq.quantizers.model import prepare_model, read_weight
from glowq.runtime.attach import attach, attached
from glowq.solving.methods.base import get_method
from support.moments import measured as moments_of
from support.tiny import logits, quantized

METHODS = ["svd", "zeroquant", "lqer", "qera", "eora", "aser", "glowq-published", "glowq-s", "glowq-s-ratio", "glowq"]


@pytest.fixture(scope="module")
def folder(compared_folder: Path) -> Path:
    return compared_folder


@pytest.fixture(scope="module")
def measured(folder: Path) -> tuple[Any, Comparison, torch.Tensor]:
    """The quantized model, the comparison of three methods at two budgets, and the report tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    train, test = (
        token_sequences(read_texts(folder / f"{name}.txt"), tokenizer, length=64, limit=1024)
        for name in ("train", "test")
    )
    model = quantized(folder / "model", "nf4")
    options: dict[str, Any] = {"methods": ["svd", "qera", "glowq"], "budgets": ["24%", "9%"]}
    found = compare_methods(model, reference=str(folder / "model"), calibration=train, **options)
    return model, found, test


class TestMeasuring:
    def test_the_model_is_left_as_it_was(self, measured: tuple[Any, Comparison, torch.Tensor], folder: Path) -> None:
        model, _, _ = measured
        assert attached(model) == {}
        fresh = quantized(folder / "model", "nf4")
        prepare_model(fresh)
        assert torch.equal(logits(model), logits(fresh))

    def test_scores_are_those_of_each_correction_attached_alone(
        self, measured: tuple[Any, Comparison, torch.Tensor], folder: Path
    ) -> None:
        model, found, sequences = measured
        reference = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
        scores = score_entries(reference, model, found.entries, sequences)
        assert list(scores) == ["reference", "quantized", *(entry.label for entry in found.entries)]
        for entry in found.entries:
            for factors in entry.factors:
                attach(model, factors)
            alone = score_models({"reference": reference, "alone": model}, sequences)
            glowq.detach(model)
            for name in ("nll", "kl", "top1"):  # the scores are paired: the same sequences in the same order
                assert torch.equal(getattr(scores[entry.label], name), getattr(alone["alone"], name))
            assert torch.equal(scores["reference"].nll, alone["reference"].nll)

    def test_one_solve_serves_every_budget(self, measured: tuple[Any, Comparison, torch.Tensor]) -> None:
        _, found, _ = measured
        entries = {(entry.method, entry.budget): entry for entry in found.entries}
        for name in ("svd", "qera"):
            large, small = entries[name, "24%"], entries[name, "9%"]
            assert large.rank is not None
            assert small.rank is not None
            assert small.rank < large.rank
            for more, less in zip(large.factors, small.factors, strict=True):
                assert torch.equal(less.right, more.right[: less.rank])

    def test_predictions_are_those_of_the_correction(
        self, measured: tuple[Any, Comparison, torch.Tensor], folder: Path, calibration: torch.Tensor
    ) -> None:
        model, found, _ = measured
        options: dict[str, Any] = {"calibration": calibration, "budget": "24%", "factor_dtype": "float"}
        correction = glowq.correct(model, reference=folder / "model", **options)
        glowq.detach(model)
        predicted = {entry.label: entry.predicted for entry in found.entries}
        assert predicted["glowq at 24%"] == correction.predicted
        assert predicted["glowq at 9%"] == correction.cut(budget="9%").predicted
        assert predicted["svd at 9%"] is predicted["qera at 24%"] is None

    def test_better_methods_come_closer_to_the_reference(
        self, measured: tuple[Any, Comparison, torch.Tensor], folder: Path
    ) -> None:
        model, found, sequences = measured
        reference = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
        scores = score_entries(reference, model, found.entries, sequences)
        divergence = {name: float(score.kl.mean()) for name, score in scores.items()}
        assert divergence["glowq at 9%"] < divergence["svd at 9%"] < divergence["quantized"]
        assert perplexity(scores["glowq at 9%"]) > 0


@pytest.fixture(scope="module")
def calibration(folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return token_sequences(read_texts(folder / "train.txt"), tokenizer, length=64, limit=1024)


@pytest.fixture(scope="module")
def grouped(folder: Path, calibration: torch.Tensor) -> list[Entry]:
    """Both kinds of GlowQ-S at one budget."""
    model, reference = quantized(folder / "model", "nf4"), str(folder / "model")
    options: dict[str, Any] = {"methods": ["glowq-s", "glowq-s-ratio"], "budgets": ["20%"]}
    return compare_methods(model, reference=reference, calibration=calibration, **options).entries


class TestWholeGroups:
    def test_factors_are_those_of_the_published_method(
        self, grouped: list[Entry], folder: Path, calibration: torch.Tensor
    ) -> None:
        model = quantized(folder / "model", "nf4")
        options: dict[str, Any] = {"method": "glowq-published", "rank": grouped[0].rank, "calibration": calibration}
        whole = {
            entry.group.name: entry for entry in glowq.correct(model, reference=folder / "model", **options).factors
        }
        for entry in grouped:
            assert 0 < len(entry.factors) < len(whole)
            assert all(torch.equal(found.right, whole[found.group.name].right) for found in entry.factors)

    def test_the_scores_decide(self, grouped: list[Entry], folder: Path) -> None:
        model = quantized(folder / "model", "nf4")
        reference = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        backends = prepare_model(model)

        def ratio(group: Group) -> float:
            full = torch.cat([reference.get_submodule(name).weight.detach() for name in group.members])
            lossy = torch.cat([read_weight(backends[name], name, model.get_submodule(name)) for name in group.members])
            return float((full - lossy).norm() / full.norm())

        groups = glowq.find_groups(model, {"input_ids": torch.zeros(1, 8, dtype=torch.int64)})
        ordered = sorted(groups, key=ratio, reverse=True)
        chosen = {factors.group for factors in grouped[1].factors}
        assert chosen == set(ordered[: len(chosen)])
        following = ordered[len(chosen)]
        size = 2 * grouped[1].rank * sum((following.in_features, *following.out_features))
        assert grouped[1].factor_bytes <= grouped[1].budget_bytes < grouped[1].factor_bytes + size


def test_of_several_forms_only_the_last_is_distilled(
    measured: tuple[Any, Comparison, torch.Tensor], folder: Path
) -> None:
    model, found, sequences = measured
    plain = [entry for entry in found.entries if entry.method == "glowq"][-1:]
    forms = [
        replace(entry, method=f"glowq+int{bits}", factors=tuple(round_group(one, bits) for one in entry.factors))
        for bits in (8, 4)
        for entry in plain
    ]
    reference = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    learned = distill_entries(model, reference, [*plain, *forms], sequences, steps=1)
    assert [entry.label for entry in learned] == ["glowq+int4+distilled at 9%"]
    assert all(one.bits == 4 for entry in learned for one in entry.factors)


def test_distilled_entries_are_those_of_the_first_that_allocates_by_gain(
    measured: tuple[Any, Comparison, torch.Tensor], folder: Path
) -> None:
    model, found, sequences = measured
    reference = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    learned = distill_entries(model, reference, found.entries, sequences, steps=2)
    plain = [entry for entry in found.entries if entry.method == "glowq"]
    assert [entry.label for entry in learned] == ["glowq+distilled at 24%", "glowq+distilled at 9%"]
    for mine, other in zip(learned, plain, strict=True):
        assert mine.factor_bytes == other.factor_bytes
        assert (mine.predicted, other.predicted is None) == (None, False)
        assert [f.group for f in mine.factors] == [f.group for f in other.factors]
    assert attached(model) == {}


@pytest.mark.parametrize("shared", [True, False])
def test_uniform_rank_is_the_largest_within_the_bytes(shared: bool) -> None:
    groups = [Group("a", ("a", "b"), 8, (3, 5), ""), Group("c", ("c",), 2, (9,), "")]

    def cost(rank: int) -> int:
        parts = [(8, 8), (9, 2)] if shared else [(3, 8), (5, 8), (9, 2)]
        return sum(2 * (outputs + inputs) * min(rank, outputs, inputs) for outputs, inputs in parts)

    for available in range(0, cost(8) + 40):
        rank = uniform_rank_within(groups, available, FactorForm(None, 2), shared=shared)
        assert cost(rank) <= available
        assert rank == (8 if shared else 5) or cost(rank + 1) > available


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_nested(name: str) -> None:
    """The first ranks of a solve equal a solve at that rank, so one solve serves every budget."""
    error, moments = moments_of()
    solve = get_method(name).solve
    small, large = solve(error, moments, 3, 0), solve(error, moments, 9, 0)
    torch.testing.assert_close(
        small.left @ small.right, large.left[:, :3] @ large.right[:3], rtol=0.0, atol=1e-4 * float(error.abs().max())
    )


class TestOverlap:
    IDS = torch.randint(0, 4096, (12, 100), generator=torch.Generator().manual_seed(0))

    def test_none(self) -> None:
        found = find_overlap(self.IDS[:6], self.IDS[6:])
        assert (found.window, found.windows, found.of, found.sequences) == (WINDOW, 0, 6 * 37, 0)

    def test_a_window_at_another_offset(self) -> None:
        report = self.IDS[6:].clone()
        report[2, 5 : 5 + WINDOW] = self.IDS[1, 30 : 30 + WINDOW]
        found = find_overlap(self.IDS[:6], report)
        assert (found.windows, found.sequences) == (1, 1)
        report[2, 5] += 1
        assert find_overlap(self.IDS[:6], report).windows == 0

    def test_short_sequences_are_compared_whole(self) -> None:
        found = find_overlap(self.IDS[:, :20], self.IDS[3:5, :20])
        assert (found.window, found.windows, found.of, found.sequences) == (20, 2, 2, 2)

    def test_refusal_says_how_much(self) -> None:
        with pytest.raises(EvaluationError, match=r"100\.0% of its windows of 64 tokens, in 2 of 2 sequences"):
            check_disjoint(self.IDS, self.IDS[:2])
        assert check_disjoint(self.IDS, self.IDS[:2], force=True).sequences == 2

    def test_the_two_parts_of_the_standard_library_share_none(self, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        train, test = (
            token_sequences(read_texts(name), tokenizer, length=256, limit=32768)
            for name in ("python-stdlib", "python-stdlib:held-out")
        )
        assert check_disjoint(train, test).windows == 0
