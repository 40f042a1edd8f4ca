"""Corrections that earlier versions wrote still load, with the same factors and the same stored facts."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import glowq
from glowq.factors.units import GainUnit
from support.bases import MODEL
from support.tiny import quantized

GOLDEN = Path(__file__).parent / "golden"
FACTS: dict[str, dict[str, Any]] = {
    "format-1.0-bfloat16": {"groups": 10, "bytes": 89_600, "int8": False, "quantized": 6.8338, "corrected": 6.7743},
    "format-1.0-int8": {"groups": 32, "bytes": 32_896, "int8": True, "quantized": 6.8338, "corrected": 6.7990},
}


@pytest.mark.parametrize("name", FACTS)
def test_facts(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        correction = glowq.Correction.from_pretrained(GOLDEN / name)
    facts, provenance = FACTS[name], correction.config.provenance
    assert len(correction.ranks) == facts["groups"]
    assert correction.factor_bytes == facts["bytes"]
    assert {entry.bits for entry in correction.factors} == {8 if facts["int8"] else None}
    assert provenance.gains is GainUnit.NATS
    assert (provenance.glowq, provenance.calibration_tokens, provenance.sequence_length) == ("0.1.0", 3584, 256)
    assert provenance.factor_dtype == ("int8" if facts["int8"] else None)
    assert provenance.held_out is not None
    found = {key: round(provenance.held_out[key], 4) for key in ("quantized", "corrected")}
    assert found == {key: facts[key] for key in found}
    stored = json.loads((GOLDEN / name / "config.json").read_text())["quantization_config"]
    expected = {key: value for key, value in stored["provenance"].items() if value is not None}
    if "int8" in expected:  # its name up to format 1.2
        figures = expected.pop("int8")
        expected["rounding"] = {"rounded": figures.pop("int8"), **figures}
    assert provenance.to_dict() == expected


@pytest.mark.parametrize("name", FACTS)
def test_factors_are_those_of_the_file(name: str) -> None:
    correction = glowq.Correction.from_pretrained(GOLDEN / name)
    stored = load_file(GOLDEN / name / "glowq.safetensors")
    assert {key: (value.dtype, value.tolist()) for key, value in correction.tensors().items()} == {
        key: (value.dtype, value.tolist()) for key, value in stored.items()
    }


@pytest.mark.parametrize("name", FACTS)
def test_it_is_attached_to_its_base_and_loads_as_a_model(name: str, tmp_path: Path, token_ids: torch.Tensor) -> None:
    model = quantized(MODEL, "nf4")
    plain = model(token_ids).logits
    glowq.load_correction(model, GOLDEN / name)
    corrected = model(token_ids).logits
    assert not torch.equal(plain, corrected)
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["base_model"]["name"] = str(MODEL)
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(token_ids).logits, corrected)
