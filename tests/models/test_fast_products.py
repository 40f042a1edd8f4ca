"""Products of half precision in float32, compared with float64. Both ways are tested on every processor, by force."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as modes
from transformers import AutoTokenizer

import glowq
from glowq.data.tokens import token_sequences
from glowq.models.fast_products import fast_products, slow_here
from glowq.models.forward import evaluating
from glowq.quantizers.model import prepare_model, read_weight
from glowq.utils.processor import float32_is_faster, forced, slowdown
from support.bases import small_model
from support.tiny import EXAMPLE, IDS, load, quantized
from support.tiny import tiny_llama as saved_llama

HALF = [torch.bfloat16, torch.float16]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(x: Tensor, y: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (x, y, x)))


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, y: F.linear(x, y[0]),
    "linear with a bias": lambda x, y: F.linear(x, y[0], y[0, :, 0]),
    "a vector": lambda x, y: F.linear(x[0, 0], y[0]),
    "matmul": lambda x, y: x @ y.transpose(1, 2),
    "einsum": lambda x, y: torch.einsum("bld,bmd->blm", x, y),
    "attention": attention,
    "convolution": lambda x, y: F.conv1d(x.transpose(1, 2), y[:, :, :3].transpose(0, 1)[:8, :, :].repeat(1, 4, 1)),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_their_gradients_are_rounded_float64_ones(name: str, dtype: torch.dtype) -> None:
    x, y = (values(2, 8, 8, seed=seed).to(dtype) for seed in (0, 1))
    results = []
    for kind in (dtype, torch.float64):
        inputs = [part.detach().to(kind).requires_grad_() for part in (x, y)]
        layer = nn.Linear(1, 1).to(dtype)  # a model of this dtype
        with forced(True), fast_products(layer):
            output = PRODUCTS[name](*inputs)
            output.backward(torch.ones_like(output))
        assert output.dtype is kind
        results.append([output.detach(), *(part.grad for part in inputs)])
    for found, expected in zip(*results, strict=True):
        scale = float(expected.abs().max())
        # Twice the rounding of the result: attention rounds its output before the backward pass reads it.
        assert torch.allclose(found.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * scale)


def test_a_product_is_the_float32_one_rounded_once() -> None:
    x, weight = values(64, 300).bfloat16(), values(200, 300, seed=1).bfloat16()
    with forced(True), fast_products(nn.Linear(1, 1).bfloat16()):
        found = F.linear(x, weight)
    assert torch.equal(found, F.linear(x.float(), weight.float()).bfloat16())


def test_nothing_is_entered_where_it_is_not_needed() -> None:
    half, single = nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2)
    for force, model in ((False, half), (True, single)):
        with forced(force), fast_products(model):
            assert not modes()
    with forced(True):
        with fast_products(half), fast_products(half, single):
            assert len(modes()) == 1
        assert not modes()
        with pytest.raises(RuntimeError), fast_products(half):
            raise RuntimeError
        assert not modes()
    assert not float32_is_faster(torch.float32)


def test_the_measurement_is_kept() -> None:
    threads = torch.get_num_threads()
    assert slowdown(torch.bfloat16) == slowdown(torch.bfloat16) > 0
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("base", ["nf4", "torchao-int4", "hqq-4", "quanto-int4"])
def test_a_quantized_model_is_as_near_to_float64_both_ways(base: str, tmp_path: Path) -> None:
    folder = saved_llama(tmp_path)
    exact = load(folder, dtype=torch.float64)
    errors = {}
    for force in (False, True):
        with forced(force):
            model = quantized(folder, base, dtype=torch.bfloat16)
            for name, backend in prepare_model(model).items():
                weight = read_weight(backend, name, model.get_submodule(name))
                exact.get_submodule(name).weight.data.copy_(weight)
            with torch.no_grad(), evaluating(model):
                found = model(input_ids=IDS).logits.double()
            with torch.no_grad():
                expected = exact(input_ids=IDS).logits
        errors[force] = float((found - expected).norm() / expected.norm())
    assert errors[True] <= 1.2 * errors[False]
    assert errors[True] < 0.02  # rounding to bfloat16 in every layer


# With the slow products of some processors, the whole model takes minutes.
@pytest.mark.parametrize(
    ("base", "whole"),
    [
        pytest.param(base, whole, marks=[pytest.mark.long] if whole else [])
        for whole in (False, True)
        for base in ("nf4", "torchao-int3")
    ],
)
def test_a_correction_is_as_good_both_ways(base: str, whole: bool) -> None:
    source = EXAMPLE if whole else small_model()
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    texts = [path.read_text("utf-8") for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("c*.py"))]
    ids = token_sequences(texts, tokenizer, length=128, limit=6144 if whole else 3072, seed=0)
    shares = {}
    for force in (False, True):
        with forced(force):
            model = quantized(source, base, dtype=torch.bfloat16)
            correction = glowq.correct(model, reference=source, calibration=ids, rank=4)
        found: Any = correction.config.provenance.improvement
        shares[force] = 1 - found["corrected"] / found["quantized"]
    assert shares[True] > 0.2
    assert abs(shares[True] - shares[False]) < 0.05  # other random labels are drawn where a logit differs by a rounding


@pytest.mark.parametrize("force", [False, True])
def test_bitsandbytes_computes_in_the_dtype_that_is_fast_here(force: bool, tmp_path: Path) -> None:
    with forced(force):
        model = quantized(saved_llama(tmp_path), "nf4", dtype=torch.bfloat16)
        names = prepare_model(model)
    wanted = torch.float32 if force else torch.bfloat16
    assert {model.get_submodule(name).compute_dtype for name in names} == {wanted}
    assert model.config.quantization_config.bnb_4bit_compute_dtype is torch.bfloat16  # what is stored does not change


@pytest.mark.parametrize(
    ("base", "force", "slow"), [("torchao-int4", True, True), ("torchao-int4", False, False), ("nf4", True, False)]
)
def test_a_base_that_is_slow_here_is_told(base: str, force: bool, slow: bool, tmp_path: Path) -> None:
    with forced(force):
        model = quantized(saved_llama(tmp_path), base, dtype=torch.bfloat16)
        prepare_model(model)
        told = slow_here(model)
    assert (told is not None) == slow
    assert told is None or ("multiplies bfloat16 matrices" in told and "--base nf4" in told)
