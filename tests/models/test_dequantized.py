"""Layers that multiply by kept dequantized weights: the same products as the library's, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from glowq.models import dequantized as module
from glowq.models.dequantized import dequantized
from glowq.models.forward import evaluating
from glowq.quantizers.model import prepare_model
from support.tiny import IDS, quantized
from support.tiny import tiny_llama as saved_llama

BASES = ["nf4", "fp4-double", "torchao-int8", "torchao-int4", "torchao-int2", "hqq-3", "quanto-int4"]


@pytest.mark.parametrize("base", BASES)
def test_answers_and_gradients_are_those_of_the_library(base: str, tmp_path: Path) -> None:
    model = quantized(saved_llama(tmp_path, dtype=torch.float32), base, dtype=torch.float32)
    prepare_model(model)
    layer = model.model.layers[0].mlp.gate_proj
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0))
    results = []
    for context in (torch.enable_grad(), dequantized(model)):
        with context:
            given = x.clone().requires_grad_()
            output = layer(given)
            (gradient,) = torch.autograd.grad(output.square().sum(), given)
            with torch.no_grad():
                results.append((output.detach(), gradient, model(input_ids=IDS).logits))
    rounding = 2e-2 if "fp4" in base or "nf4" in base else 1e-3  # bitsandbytes computes in bfloat16 here
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=rounding * float(expected.abs().max()))
    assert not any("forward" in vars(part) for part in model.modules())


def test_a_layer_that_rounds_its_inputs_runs_as_it_is(tmp_path: Path) -> None:
    model = quantized(saved_llama(tmp_path), "int8", dtype=torch.bfloat16)
    prepare_model(model)
    with dequantized(model):
        assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_weights_are_kept_within_the_memory_that_is_free(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(saved_llama(tmp_path), "torchao-int4", dtype=torch.bfloat16)
    names = prepare_model(model)
    read: list[str] = []
    for backend in set(names.values()):
        weight = type(backend).weight
        monkeypatch.setattr(type(backend), "weight", lambda self, part, w=weight: (read.append(""), w(self, part))[1])
    monkeypatch.setattr(module, "_SHARE", share)
    with torch.no_grad(), evaluating(model):
        first = model(input_ids=IDS).logits
        second = model(input_ids=IDS).logits
    assert torch.equal(first, second)
    assert len(read) == len(names) * (1 if share else 2)


def test_a_forward_of_its_own_stays(tmp_path: Path) -> None:
    model: Any = quantized(saved_llama(tmp_path), "torchao-int4", dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    called: list[torch.Tensor] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        called.append(x)
        return nn.Linear.forward(layer, x)

    layer.forward = forward
    with torch.no_grad(), dequantized(model):
        model(input_ids=IDS)
        assert layer.forward is forward
    assert called
    assert layer.forward is forward
