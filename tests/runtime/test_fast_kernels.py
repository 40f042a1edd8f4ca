"""Kernels that rewrite weights: used only after `use_fast_kernels`, after which the model can only be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import glowq
from glowq.errors import RepackedWeightError
from glowq.quantizers.model import prepare_model, quantized_modules
from support.bases import Base, repacks, rows
from support.tiny import TEXTS, load, logits

pytestmark = pytest.mark.usefixtures("uncompiled")

REWRITTEN = rows("nf4", "nf4-double") if repacks() else []
REWRITTEN += rows("auto-gptq-int4", "awq-int4")  # gptqmodel uses torch's int4 kernels for these
OTHERS = rows("torchao-int8") + ([] if repacks() else rows("nf4"))


def prepared(base: Base) -> Any:
    model = base.load(dtype=torch.bfloat16)
    prepare_model(model)
    return model


def answer(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits.float()
    return found


@pytest.mark.parametrize("base", REWRITTEN)
def test_the_model_says_nearly_the_same_and_is_not_corrected(base: Base, token_ids: Tensor, source: Path) -> None:
    model = prepared(base)
    assert glowq.use_fast_kernels(model) == len(quantized_modules(model))
    expected = answer(prepared(base), token_ids[:1])
    # The kernels round scales and sums to bfloat16, with eight bits of mantissa.
    assert (answer(model, token_ids[:1]) - expected).norm() < 0.03 * expected.norm()
    with pytest.raises(RepackedWeightError):
        glowq.correct(model, reference=model, calibration=TEXTS, tokenizer=AutoTokenizer.from_pretrained(source))


@pytest.mark.skipif(not repacks(), reason="bitsandbytes repacks on AVX512-BF16 CPUs only")
def test_a_corrected_model_is_not_saved(rank_8: Path, tmp_path: Path) -> None:
    model = load(rank_8)
    before = logits(model)
    assert glowq.use_fast_kernels(model) == len(quantized_modules(model))
    assert (logits(model) - before).norm() < 0.03 * before.norm()
    with pytest.raises(RepackedWeightError, match="load the model again"):
        model.save_pretrained(tmp_path / "full")
    assert not list((tmp_path / "full").glob("*.safetensors"))


@pytest.mark.parametrize("base", OTHERS)
def test_a_base_without_such_a_kernel_stays_as_it_is(base: Base, token_ids: Tensor) -> None:
    model = prepared(base)
    before = answer(model, token_ids[:1])
    assert glowq.use_fast_kernels(model) == 0
    assert torch.equal(answer(model, token_ids[:1]), before)
