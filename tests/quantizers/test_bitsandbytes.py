"""A 4-bit kernel that is wrong on some processors: layers that it computes wrongly are left out and named."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import glowq
from glowq.models.tracing import trace_groups
from glowq.utils import processor

SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
ODD = "model.layers.0.mlp.down_proj"
INPUTS = {"input_ids": torch.arange(12)[None]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose down_proj is 96 wide, so that its rows end inside of a block of 64."""
    folder = tmp_path_factory.mktemp("odd")
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, intermediate_size=96)).save_pretrained(folder)
    base = glowq.GlowQConfig(base="nf4").base
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=base, dtype=torch.float32)


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bitsandbytes' AVX512 kernel does: scales of other blocks where rows end inside of one."""
    right = bitsandbytes.matmul_4bit

    def multiplied(x: Tensor, weight: Tensor, quant_state: Any, bias: Tensor | None = None) -> Tensor:
        found: Tensor = right(x, weight, bias=bias, quant_state=quant_state)
        return found * (1.2 if quant_state.shape[1] % 64 else 1)

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", multiplied)


@pytest.mark.usefixtures("wrong_kernel")
def test_a_layer_that_this_processor_computes_wrongly_is_left_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "has_avx512", lambda: True)
    trace = trace_groups(model, INPUTS)
    assert trace.skipped == {ODD: "its output differs from W x + b by 20%"}
    assert len(trace.groups) == 3


def test_a_right_kernel_is_not_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "has_avx512", lambda: True)
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        assert trace_groups(model, INPUTS).skipped == {}
    monkeypatch.setattr(processor, "has_avx512", lambda: False)
    assert trace_groups(model, INPUTS).skipped == {}


def test_weights_can_be_read_after_groups_were_found(model: Any) -> None:
    """On AVX512-BF16, bitsandbytes repacks a weight in the first forward that needs no gradients."""
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    assert len(glowq.find_groups(model, INPUTS)) == 4
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
