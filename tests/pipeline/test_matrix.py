"""Every base through the public API: correcting it, saving both forms, and loading them again bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

import glowq
from glowq.data.text import read_texts
from glowq.data.tokens import token_sequences
from glowq.errors import ConfigError
from glowq.evaluation.scores import score_models
from glowq.quantizers.model import prepare_model, quantized_modules
from glowq.quantizers.registry import method_of
from support.bases import Base, rows, small_model
from support.tiny import CALIBRATION, gap, load, logits

pytestmark = pytest.mark.usefixtures("uncompiled")

RANK = 8


def _dtype(base: Base) -> torch.dtype:
    return torch.bfloat16 if base.bits <= 4 else torch.float32


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    """Token ids of held-out text, shape (16, 128)."""
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    return token_sequences(read_texts("python-stdlib:held-out"), tokenizer, length=128, limit=2048, seed=1)


@pytest.fixture(scope="module", params=rows())
def made(request: pytest.FixtureRequest) -> tuple[Base, Any, glowq.Correction]:
    """One row, its corrected model and the correction.

    Models of 8 bits are float32, because bfloat16 rounding would hide their small quantization error.
    """
    base: Base = request.param
    model = base.load(dtype=_dtype(base))
    correction = glowq.correct(
        model,
        reference=small_model(),
        calibration="python-stdlib",
        tokenizer=AutoTokenizer.from_pretrained(small_model()),
        rank=RANK,
        **{**CALIBRATION, "calibration_tokens": 2048},
    )
    return base, model, correction


def test_the_correction_brings_the_model_nearer_to_the_reference(made: Any, held_out: Tensor) -> None:
    base, model, _ = made
    reference = load(small_model(), dtype=_dtype(base))
    after = float(score_models({"reference": reference, "model": model}, held_out)["model"].kl.mean())
    with glowq.disabled(model):
        before = float(score_models({"reference": reference, "model": model}, held_out)["model"].kl.mean())
    assert after < (0.9 if base.bits <= 4 else 1.0) * before


def test_saved_by_reference_and_loaded_again_is_the_same_model(made: Any, tmp_path: Path) -> None:
    base, model, correction = made
    expected = logits(model)
    if correction.unstored is not None:
        with pytest.raises(ConfigError, match="stored nowhere"):
            correction.save_pretrained(tmp_path / "corr")
        return
    correction.save_pretrained(tmp_path / "corr")
    if base.read is None:
        assert gap(load(tmp_path / "corr"), expected) == 0.0
    again = base.load(dtype=_dtype(base))
    glowq.load_correction(again, tmp_path / "corr")
    assert gap(again, expected) == 0.0


def test_saved_in_one_piece_and_loaded_again_is_the_same_model_or_refused(made: Any, tmp_path: Path) -> None:
    base, model, _ = made
    if any(backend.saves == "never" for backend in quantized_modules(model).values()):
        with pytest.raises(ConfigError, match="one piece"):
            model.save_pretrained(tmp_path / "full")
        return
    expected = logits(model)
    model.save_pretrained(tmp_path / "full")
    loaded = load(tmp_path / "full")
    assert gap(loaded, expected) == 0.0
    assert method_of(loaded.config.quantization_config) == "glowq"
    loaded.save_pretrained(tmp_path / "again")
    assert gap(load(tmp_path / "again"), expected) == 0.0
    loaded.save_pretrained(tmp_path / "full")  # overwrites the files that it was loaded from
    assert gap(load(tmp_path / "full"), expected) == 0.0
    if not base.is_preset and base.read is None:
        _the_same_tensors(base.checkpoint(small_model()), tmp_path / "full", quantized_modules(model))


def _the_same_tensors(original: Path, saved: Path, modules: Any) -> None:
    """Assert that saving writes the quantized tensors of the checkpoint, even if the library changed them in memory."""
    before, after = load_file(original / "model.safetensors"), load_file(saved / "model.safetensors")
    quantized = [key for key in before if key.rpartition(".")[0] in modules]
    assert quantized
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in quantized)


def test_detached_it_is_the_quantized_model_again(made: Any) -> None:
    base, model, _ = made
    plain = base.load(dtype=_dtype(base))
    prepare_model(plain)
    glowq.detach(model)
    assert gap(model, logits(plain)) == 0.0
