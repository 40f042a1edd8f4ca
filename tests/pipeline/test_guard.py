"""A correction that does not help on text that it was not made of is refused, and kept only if that is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import glowq
from glowq.errors import NoImprovementError, SensitivityError
from glowq.evaluation.figures import is_better, is_worse
from glowq.evaluation.improvement import improvement
from glowq.pipeline.block_solver import BlockSolver
from glowq.runtime.attach import attached
from support.cli import call, result_of
from support.tiny import CALIBRATION, TEXTS, correct, corrected, library_texts, load, quantized

BASE = "torchao-int2"


@pytest.fixture
def reversed_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every correction points away from the error that it should remove."""
    solve = BlockSolver.solve

    def backwards(self: Any, stops: Any, sequences: Tensor) -> list[list[Any]]:
        return [
            [replace(item, lefts={name: -left for name, left in item.lefts.items()}) for item in found]
            for found in solve(self, stops, sequences)
        ]

    monkeypatch.setattr(BlockSolver, "solve", backwards)


def answers(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits.double().log_softmax(-1)
    return found


def test_what_is_measured_is_the_divergence_of_whole_forwards(source: Path) -> None:
    model = quantized(source, BASE, dtype=torch.float32)
    correction = correct(model, source)
    ids = torch.randint(1, 4096, (6, 64), generator=torch.Generator().manual_seed(5))
    wanted = answers(load(source, dtype=torch.float32), ids)
    means = {}
    for name in ("corrected", "quantized"):
        means[name] = (wanted.exp() * (wanted - answers(model, ids))).sum(-1).mean(1)
        glowq.detach(model)
    found = improvement(model, load(source, dtype=torch.float32), correction.factors, ids)
    for name, values in means.items():
        assert found[name] == pytest.approx(float(values.mean()), rel=1e-4)
    assert found["benefit"]["value"] == pytest.approx(found["quantized"] - found["corrected"], rel=1e-6)
    assert found["tokens"] == ids.numel()
    assert is_better(found)
    assert not attached(model)


def test_a_useful_correction_says_how_useful_it_is(source: Path) -> None:
    for method in ("glowq", "glowq-published", "svd"):
        found = corrected(source, BASE, method=method)[1].config.provenance.improvement
        assert found is not None
        assert found["tokens"] == 128
        assert found["corrected"] < found["quantized"]


def no_answer(output: Any) -> list[Tensor]:
    raise SensitivityError("nothing to compare")


@pytest.mark.parametrize("method", ["svd", "glowq-published", "glowq-one-sided"])
@pytest.mark.parametrize("is_comparable", [True, False])
def test_a_model_whose_outputs_cannot_be_compared_is_corrected_all_the_same(
    method: str, is_comparable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head for labels can be compared. Its logits are taken away from the measurement for the second case."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    BertForSequenceClassification(BertConfig(**shape, num_attention_heads=4)).save_pretrained(tmp_path)
    base = glowq.GlowQConfig(base="nf4").base
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=base)
    ids = torch.randint(1, 200, (12, 32))
    if not is_comparable:
        monkeypatch.setattr("glowq.evaluation.improvement.answer", no_answer)
    correction = glowq.correct(model, reference=tmp_path, calibration=ids, rank=4, method=method, force=is_comparable)
    assert (correction.config.provenance.improvement is not None) == is_comparable
    assert attached(model)


@pytest.mark.usefixtures("reversed_solver")
class TestWorse:
    def test_it_is_refused_and_the_model_is_left_as_it_was(self, source: Path) -> None:
        model = quantized(source, BASE)
        with pytest.raises(NoImprovementError, match=r"makes the model worse: on 128 tokens .* Nothing is kept\."):
            correct(model, source, rank=8)
        assert not attached(model)

    def test_from_pretrained_refuses_it_too(self, source: Path) -> None:
        config = glowq.GlowQConfig(base=BASE, rank=8, calibration=TEXTS, **CALIBRATION)
        with pytest.raises(NoImprovementError, match="makes the model worse"):
            load(source, quantization_config=config)

    def test_force_keeps_it_and_the_card_says_so(self, source: Path) -> None:
        correction = correct(quantized(source, BASE), source, rank=8, force=True)
        found = correction.config.provenance.improvement
        assert found is not None
        assert is_worse(found)
        assert "not\nbetter than none; it was kept with `--force`" in correction.model_card()

    def test_the_command_keeps_nothing(self, source: Path, tmp_path: Path) -> None:
        library_texts(tmp_path)
        options = ["correct", source, "--base", BASE, "--calibration", tmp_path / "train.txt", "--rank", 8]
        options += ["--calibration-tokens", 1024, "--sequence-length", 128, "--output", tmp_path / "out"]
        done = call(*options)
        assert done.exit_code == 1
        assert done.stderr.strip().splitlines()[-1].startswith("glowq: error: the correction makes the model worse")
        assert not (tmp_path / "out").exists()
        assert not is_better(result_of(*options, "--force")["improvement"])
        assert "kept with `--force`" in (tmp_path / "out" / "README.md").read_text()


def test_the_command_refuses_what_is_not_better_beyond_chance(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library_texts(tmp_path)
    tiny = {"value": 1e-6, "low": -1e-6, "high": 3e-6}
    figures = {"tokens": 128, "quantized": 0.02, "corrected": 0.019999, "benefit": tiny}
    monkeypatch.setattr("glowq.pipeline.correct.improvement", lambda *args: figures)
    options = ["correct", source, "--base", BASE, "--calibration", tmp_path / "train.txt", "--rank", 4]
    options += ["--calibration-tokens", 1024, "--sequence-length", 128, "--output", tmp_path / "out"]
    done = call(*options)
    assert done.exit_code == 1
    assert "the correction is not better than none: on 128 tokens" in done.stderr
    assert not (tmp_path / "out").exists()
