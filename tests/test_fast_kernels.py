"""Kernels that rewrite their weights: kept away until asked for, and from then on the model is only run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXTS, load, logits
from torch import Tensor
from transformers import AutoTokenizer

import glowq
from bases import BASES, Base
from glowq.backends import prepare_model, quantized_modules
from glowq.errors import RepackedWeightError

ROWS = {base.name: base for base in BASES}


def may_rewrite(base: Base) -> bool:
    """Whether this machine has such a kernel for the base."""
    if base.package == "bitsandbytes":
        from bitsandbytes.functional import has_avx512bf16

        return bool(has_avx512bf16())
    return base.name in ("auto-gptq-int4", "awq-int4")  # for which gptqmodel picks torch's int4 products


@pytest.fixture(params=["nf4", "nf4-double", "auto-gptq-int4", "awq-int4"])
def released(request: pytest.FixtureRequest) -> tuple[Base, Any, int]:
    """A prepared model with its fast kernels let loose, and how many modules take another one."""
    base = ROWS[request.param]
    if not base.installed:
        pytest.skip(f"needs {base.package}")
    model = base.load(dtype=torch.bfloat16)
    prepare_model(model)
    return base, model, glowq.use_fast_kernels(model)


def answer(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits.float()
    return found


def test_the_model_says_nearly_the_same(released: tuple[Base, Any, int], token_ids: Tensor) -> None:
    base, model, count = released
    slow = base.load(dtype=torch.bfloat16)
    prepare_model(slow)
    assert count in (0, len(quantized_modules(model)))
    assert bool(count) == may_rewrite(base)
    expected = answer(slow, token_ids[:1])
    # The kernels round scales and sums to eight bits of mantissa.
    assert (answer(model, token_ids[:1]) - expected).norm() < 0.03 * expected.norm()


def test_it_is_not_corrected(released: tuple[Base, Any, int], token_ids: Tensor, source: Path) -> None:
    _, model, count = released
    if not count:
        pytest.skip("this machine has no kernel that rewrites a weight")
    answer(model, token_ids[:1])
    with pytest.raises(RepackedWeightError):
        glowq.correct(model, reference=model, calibration=TEXTS, tokenizer=AutoTokenizer.from_pretrained(source))


@pytest.mark.skipif(not may_rewrite(ROWS["nf4"]), reason="bitsandbytes repacks on AVX512-BF16 CPUs only")
def test_a_corrected_model_is_not_saved(rank_8: Path, tmp_path: Path) -> None:
    model = load(rank_8)
    before = logits(model)
    assert glowq.use_fast_kernels(model) == len(quantized_modules(model))
    assert (logits(model) - before).norm() < 0.03 * before.norm()
    with pytest.raises(RepackedWeightError, match="load the model again"):
        model.save_pretrained(tmp_path / "full")
    assert not list((tmp_path / "full").glob("*.safetensors"))


def test_a_base_without_such_a_kernel_stays_as_it_is(token_ids: Tensor) -> None:
    model = ROWS["torchao-int8"].load()
    prepare_model(model)
    before = answer(model, token_ids[:1])
    assert glowq.use_fast_kernels(model) == 0
    assert torch.equal(answer(model, token_ids[:1]), before)
