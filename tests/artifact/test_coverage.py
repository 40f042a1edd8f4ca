"""The share of a model's weights that a correction covers is said: in the result, in config.json, and on the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import glowq
from glowq.artifact.coverage import coverage_of, covered
from glowq.errors import ConfigError
from glowq.factors.group import Group
from glowq.models.tracing import Trace
from support.cli import result_of
from support.shrunk import save_shrunk
from support.tiny import TEXTS

OPTIONS: dict[str, Any] = {"calibration": TEXTS, "calibration_tokens": 512, "sequence_length": 32, "force": True}


def quantized_bytes(model: nn.Module) -> int:
    """By bitsandbytes' own tensors: four bits a value, and a float32 scale for 64 values."""
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    return sum(layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes for layer in layers)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A mixture of experts whose experts bitsandbytes leaves in float; corrected, and saved."""
    folder = tmp_path_factory.mktemp("mixture")
    save_shrunk("mixtral", folder / "source")
    base = glowq.GlowQConfig(base="nf4").base
    model = AutoModelForCausalLM.from_pretrained(folder / "source", quantization_config=base)
    tokenizer = AutoTokenizer.from_pretrained(folder / "source")
    size = quantized_bytes(model)
    correction = glowq.correct(model, reference=folder / "source", tokenizer=tokenizer, rank=2, **OPTIONS)
    correction.save_pretrained(folder / "correction")
    return model, correction, size, folder / "correction"


def test_experts_in_float_are_counted_as_not_quantized(mixture: Any) -> None:
    model, correction, size, _ = mixture
    # Attention is quantized, all else is not; the factors that are attached belong to neither.
    floats = {name: part.nbytes for name, part in model.named_parameters() if "self_attn" not in name}
    experts = sum(count for name, count in floats.items() if "experts" in name)
    coverage = correction.config.provenance.coverage
    assert sum(coverage["modules"].values()) == size
    assert coverage["not_quantized"]["MixtralExperts"] == experts
    assert sum(coverage["not_quantized"].values()) == sum(floats.values())
    found = covered(coverage, (entry.group for entry in correction.factors))
    assert found is not None
    assert found["corrected"] == pytest.approx(size / (size + sum(floats.values())))
    assert found["corrected"] + found["not_quantized"] == pytest.approx(1)
    assert found["text"][0] == f"{found['corrected']:.1%} corrected"
    assert "MixtralExperts" in found["text"][-1]


def test_files_and_the_card_say_the_same_also_after_a_cut(mixture: Any, tmp_path: Path) -> None:
    _, correction, _, folder = mixture
    whole = result_of("inspect", str(folder))["coverage"]
    assert whole == covered(correction.config.provenance.coverage, (entry.group for entry in correction.factors))
    assert f"| Weights, by bytes | {'; '.join(whole['text'])} |" in (folder / "README.md").read_text()
    budget = str(correction.factor_bytes // 3)
    result_of("select", str(folder), "--budget", budget, "--output", str(tmp_path / "cut"))
    cut = result_of("inspect", str(tmp_path / "cut"))["coverage"]
    assert 0 < cut["corrected"] < whole["corrected"]
    assert cut["corrected"] + cut["not_restored"] == pytest.approx(whole["corrected"])
    assert any("in groups that got no rank" in part for part in cut["text"])


def test_reasons_are_counted_in_bytes(mixture: Any) -> None:
    model, *_ = mixture
    layers = [name for name, part in model.named_modules() if isinstance(part, bitsandbytes.nn.Linear4bit)]
    first, *others = layers
    groups = [Group(name, (name,), 64, (64,), "") for name in others]
    found = covered(coverage_of(model, Trace(groups, {first: "a reason"})), groups)
    assert found is not None
    assert 0 < found["skipped"] < found["corrected"]
    assert f"{found['skipped']:.1%} quantized, cannot be corrected (a reason)" in found["text"]


def test_a_correction_of_an_earlier_version_has_none() -> None:
    assert covered(None, []) is None


@pytest.mark.parametrize("wrong", [{"modules": 3}, {"modules": {"a": -1}}, {"skipped": {"a": "many"}}, [1]])
def test_damaged_figures_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"provenance\.coverage"):
        glowq.GlowQConfig(base="nf4").record(coverage=wrong)
