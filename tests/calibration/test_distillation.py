"""Distilled factors are closer to the reference model on held-out text, and have the same shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import glowq
from glowq.calibration.distillation import distill
from glowq.data.text import read_texts
from glowq.data.tokens import token_sequences
from glowq.errors import CalibrationError, ConfigError, NonFiniteError, SensitivityError
from glowq.evaluation.scores import score_models
from glowq.factors.integers import pack, unpack
from glowq.factors.rounding import round_group
from glowq.models.tracing import find_groups
from glowq.runtime.attach import applied
from support.bases import small_model
from support.gradients import cut_gradient
from support.tiny import correct, gap, load, logits, quantized
from support.tiny import tiny_llama as saved_llama

Factory = Callable[..., Any]


@pytest.fixture(scope="module")
def source() -> Path:
    return small_model()


def sequences(source: Path, text: str, tokens: int) -> Tensor:
    return token_sequences(read_texts(text), AutoTokenizer.from_pretrained(source), length=128, limit=tokens, seed=0)


def test_nearer_to_the_reference_on_text_that_was_not_seen_at_the_same_bytes(source: Path) -> None:
    reference, train = load(source), sequences(source, "python-stdlib", 4096)
    held = sequences(source, "python-stdlib:held-out", 2048)
    scores = {}
    for name, steps in (("plain", 0), ("distilled", 6)):
        model = quantized(source, "torchao-int3")
        options: dict[str, Any] = {"reference": source, "calibration": train, "budget": "1%", "distill": steps}
        correction = glowq.correct(model, **options)
        assert correction.config.provenance.distilled_steps == (steps or None)
        scores[name] = score_models({"reference": reference, name: model}, held)[name].kl, correction
    (before, plain), (after, distilled) = scores["plain"], scores["distilled"]
    assert (distilled.ranks, distilled.factor_bytes) == (plain.ranks, plain.factor_bytes)
    difference = after - before
    assert float(difference.mean() + 2 * difference.std() / len(difference) ** 0.5) < 0
    assert float(after.mean()) < 0.97 * float(before.mean())


def test_rounded_factors_are_trained_as_they_are_used(source: Path) -> None:
    """Steps with rounded factors end nearer to the reference than the same steps before the factors are rounded."""
    reference, train = load(source), sequences(source, "python-stdlib", 4096)
    held = sequences(source, "python-stdlib:held-out", 2048)
    model = quantized(source, "torchao-int3")
    options: dict[str, Any] = {"reference": source, "calibration": train, "rank": 6}
    solved = glowq.correct(model, **options).factors
    glowq.detach(model)
    after = [round_group(entry, 3) for entry in distill(model, reference, solved, train, steps=6)[0]]
    during, _ = distill(model, reference, solved, train, steps=6, bits=3)
    found = {}
    for name, factors in (
        ("solved", [round_group(entry, 3) for entry in solved]),
        ("after", after),
        ("during", during),
    ):
        with applied(model, factors):
            found[name] = score_models({"reference": reference, name: model}, held)[name].kl
    assert {entry.bits for entry in during} == {3}
    for entry in during:
        packed = pack(entry.right, entry.lefts, 3)
        assert torch.equal(unpack(packed, entry.right.dtype, entry.group.shapes)[0], entry.right)
    assert float(found["during"].mean()) < float(found["after"].mean()) < float(found["solved"].mean())


def test_a_rounded_correction_can_be_distilled(source: Path) -> None:
    options: dict[str, Any] = {"calibration": sequences(source, "python-stdlib", 1024), "rank": 2, "distill": 1}
    correction = glowq.correct(quantized(source, "nf4"), reference=source, factor_dtype="int4", **options)
    assert {entry.bits for entry in correction.factors} == {4}
    provenance = correction.config.provenance
    assert (provenance.factor_dtype, provenance.distilled_steps) == ("int4", 1)
    assert provenance.rounding is not None


def test_the_same_seed_gives_the_same_bits_and_files_load_as_saved(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": sequences(source, "python-stdlib", 1024), "rank": 2, "distill": 1}
    model = quantized(source, "nf4")
    first = glowq.correct(model, reference=source, **options)
    second = glowq.correct(quantized(source, "nf4"), reference=source, **options)
    assert all(torch.equal(tensor, second.tensors()[name]) for name, tensor in first.tensors().items())
    first.save_pretrained(tmp_path / "corrected")
    assert gap(load(tmp_path / "corrected"), logits(model)) == 0.0


def test_the_model_is_left_as_it_was(tiny_llama: Factory, tiny_ids: Tensor, random_factors: Factory) -> None:
    reference, model = tiny_llama(), tiny_llama().train()
    frozen = next(model.parameters()).requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    factors = [random_factors(group, scale=0.1) for group in find_groups(model, {"input_ids": tiny_ids})]
    found, _ = distill(model, reference, factors, tiny_ids.repeat(8, 1), steps=3)
    assert model.training
    assert not frozen.requires_grad
    assert all(p.requires_grad for name, p in model.named_parameters() if p is not frozen)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any("glowq" in name for name, _ in model.named_modules())
    for old, new in zip(factors, found, strict=True):  # distillation reduces random factors, which only do harm
        assert (new.group, new.right.shape, new.right.dtype) == (old.group, old.right.shape, old.right.dtype)
        assert not torch.equal(new.right, old.right)
        assert torch.equal(new.gains, old.gains)


def test_what_does_no_better_on_held_out_sequences_is_not_taken(
    tiny_llama: Factory, tiny_ids: Tensor, random_factors: Factory
) -> None:
    model = tiny_llama()
    factors = [random_factors(group, scale=0.1) for group in find_groups(model, {"input_ids": tiny_ids})]
    none = [
        replace(entry, lefts={name: torch.zeros_like(left) for name, left in entry.lefts.items()}) for entry in factors
    ]
    ids = tiny_ids.repeat(8, 1)
    found, taken = distill(model, model, none, ids, steps=2)  # nothing can be closer than the model itself
    assert taken == 0
    assert all(torch.equal(new.right, old.right) for new, old in zip(found, none, strict=True))


def test_it_stops_when_a_round_of_steps_gains_little(
    source: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Factory, tiny_ids: Tensor, random_factors: Factory
) -> None:
    reference, train = load(source), sequences(source, "python-stdlib", 2048)
    model = quantized(source, "torchao-int3")
    solved = glowq.correct(model, reference=source, calibration=train, rank=2).factors
    glowq.detach(model)
    monkeypatch.setattr("glowq.calibration.distillation._ROUND", 2)
    assert distill(model, reference, solved, train, steps="auto")[1] in (2, 4, 6)
    monkeypatch.setattr("glowq.calibration.distillation._LEAST", 0.9)
    first, least = distill(model, reference, solved, train, steps="auto")
    assert least == 2
    again, _ = distill(model, reference, solved, train, steps=2)
    for entry, other in zip(first, again, strict=True):
        assert torch.equal(entry.right, other.right)
    ids = tiny_ids.repeat(8, 1)
    same = tiny_llama()
    none = [random_factors(group, scale=0.0) for group in find_groups(same, {"input_ids": tiny_ids})]
    assert distill(same, same, none, ids, steps="auto")[1] == 0


def test_auto_is_a_number_of_steps_that_the_correction_tells(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glowq.calibration.distillation._ROUND", 1)
    options: dict[str, Any] = {"calibration": sequences(source, "python-stdlib", 1024), "rank": 2, "distill": "auto"}
    correction = glowq.correct(quantized(source, "torchao-int3"), reference=source, **options)
    assert correction.config.provenance.distilled_steps in (1, 2, 3)


def test_bad_input_is_named(tiny_llama: Factory, tiny_ids: Tensor, random_factors: Factory) -> None:
    model = tiny_llama()
    factors = [random_factors(group) for group in find_groups(model, {"input_ids": tiny_ids})]
    assert distill(model, model, [], tiny_ids, steps=1) == ([], 0)
    with pytest.raises(ConfigError, match="at least 1 step, found 0"):
        distill(model, model, factors, tiny_ids, steps=0)
    with pytest.raises(CalibrationError, match="2 calibration sequences or more, found 1"):
        distill(model, model, factors, tiny_ids[:1], steps=1)
    broken = tiny_llama()
    broken.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="divergence from the reference is NaN"):
        distill(model, broken, factors, tiny_ids, steps=1)

    handle = cut_gradient(model.model.layers[1])
    with pytest.raises(SensitivityError, match=r"layers\.0.*no gradient reaches its factors"):
        distill(model, tiny_llama(), factors, tiny_ids, steps=1)
    handle.remove()
    assert not any("glowq" in name for name, _ in model.named_modules())


def test_an_unknown_number_of_steps_is_refused_before_any_work(tmp_path: Path) -> None:
    source = saved_llama(tmp_path / "source")
    with pytest.raises(ConfigError, match="distill must be a whole number of at least 0, found -1"):
        correct(quantized(source, "nf4"), source, distill=-1)
    with pytest.raises(ConfigError, match="distill must be"):
        glowq.GlowQConfig(base="nf4", distill=-1, calibration=["x"])
