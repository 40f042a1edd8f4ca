"""Experts that are modules of their own: those that few tokens reach are corrected or left out, and named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

import glowq
from glowq.calibration.input_moments import MomentCollector
from glowq.calibration.pooled_moments import families, moments_of
from glowq.errors import CalibrationError
from glowq.factors.group import Group
from glowq.models.tracing import find_groups
from support.tiny import EXAMPLE, TEXTS, seeded

Switch = SwitchTransformersForConditionalGeneration
MEMBERS = ("attention.q", "experts.0.up", "experts.1.up", "experts.2.up", "experts.0.down")


def group_of(name: str, block: str = "layers.3") -> Group:
    return Group(f"{block}.{name}", (f"{block}.{name}",), 4, (6,), block)


def test_families_are_named_alike_but_for_numbers() -> None:
    found = families([group_of(name) for name in MEMBERS] + [group_of("experts.0.up", "layers.4")])
    names = [[group.name.partition(".")[2] for group in family] for family in found]
    assert names == [
        ["3.attention.q"],
        ["3.experts.0.up", "3.experts.1.up", "3.experts.2.up"],
        ["3.experts.0.down"],
        ["4.experts.0.up"],
    ]


@pytest.mark.parametrize("statistic", ["second", "magnitude"])
def test_an_expert_with_fewer_tokens_than_its_rank_takes_the_moments_of_all(statistic: str) -> None:
    groups = [group_of(name) for name in MEMBERS[1:4]]
    collectors = [MomentCollector(group, statistic) for group in groups]
    inputs = [torch.randn(count, 4, generator=torch.Generator().manual_seed(count)) for count in (9, 2, 0)]
    for collector, x in zip(collectors, inputs, strict=True):
        if len(x):
            collector.update(x)
    found, pooled = moments_of(collectors, {group.name: 3 for group in groups})
    assert pooled == groups[1:]
    seen = torch.cat(inputs).double()
    for group, x in zip(groups, (inputs[0].double(), seen, seen), strict=True):
        moments = found[group.name]
        assert moments.tokens == len(x)
        if statistic == "second":
            assert moments.second is not None
            torch.testing.assert_close(moments.second, x.T @ x / len(x), rtol=1e-5, atol=1e-6)
        else:
            assert moments.magnitude is not None
            expected = torch.stack([part.abs().mean(0) for part in inputs[: 1 if x is not seen else 2]]).amax(0)
            torch.testing.assert_close(moments.magnitude, expected.double(), rtol=1e-5, atol=1e-6)


def test_where_no_expert_of_a_layer_gets_a_token_the_text_is_refused() -> None:
    groups = [group_of(name) for name in MEMBERS[1:4]]
    with pytest.raises(CalibrationError, match=r"experts\.0\.up: no calibration token reached"):
        moments_of([MomentCollector(group, "second") for group in groups], {group.name: 3 for group in groups})


def test_the_modules_of_an_expert_share_its_input() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.gate(x).sigmoid() * self.up(x))

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Expert() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([expert(x[index : index + 2]) for index, expert in enumerate(self.experts)])

    model = nn.Module()
    model.layers = nn.ModuleList([Mixture()])
    model.forward = lambda x: model.layers[0](x)  # type: ignore[method-assign]
    names = [group.name for group in find_groups(model, {"x": torch.randn(8, 4)})]
    assert names == [f"layers.0.experts.{index}.{part}" for index in range(3) for part in ("gate+up", "down")]


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Switch transformer with 16 experts in one layer of the encoder and one of the decoder."""
    folder = tmp_path_factory.mktemp("switch")
    sizes = {"vocab_size": 4096, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_heads": 4, "num_experts": 16}
    layers = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    with seeded(0), torch.no_grad():
        model = Switch(SwitchTransformersConfig(**sizes, **layers, **ids))
        for weight in (part for part in model.parameters() if part.dim() == 2):
            weight.normal_(std=0.08)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EXAMPLE).save_pretrained(folder)
    return folder


def corrected(folder: Path, **options: Any) -> Any:
    model = Switch.from_pretrained(folder, quantization_config=glowq.GlowQConfig(base="torchao-int4").base)
    text = {"calibration": TEXTS, "sequence_length": 32, "tokenizer": AutoTokenizer.from_pretrained(folder)}
    return glowq.correct(model, reference=folder, rank=4, force=True, **text, **options)


def test_experts_that_little_text_reaches_are_corrected_or_named(
    switch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="glowq"):
        correction = corrected(switch, calibration_tokens=256)
    assert "got fewer tokens than ranks: their input is taken to be that of all experts of their layer." in caplog.text
    assert "on this text the model does not use the outputs of encoder.block.1.layer.1.mlp.experts." in caplog.text
    found = {name for name in correction.ranks if "expert" in name}
    assert 8 < len(found) < 64
    assert all(bool(torch.isfinite(entry.right).all()) for entry in correction.factors)


def test_methods_without_gradients_take_the_pooled_moments_for_them(switch: Path) -> None:
    few = corrected(switch, calibration_tokens=256, method="qera")
    assert len([name for name in few.ranks if "expert" in name]) > 8


def test_more_of_the_text_is_traced_for_modules_that_its_start_does_not_call(switch: Path) -> None:
    correction = corrected(switch, calibration_tokens=512)
    names = {name.rpartition(".")[0] for name in correction.ranks if "encoder.block.1.layer.1.mlp.experts" in name}
    assert len(names) > 4  # the first 8 tokens reach few of the 16
