"""Models of kinds that once could not be corrected, saved or loaded: one tiny random model for each kind of fault."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import glowq
from glowq.artifact.factor_tensors import factor_tensors
from glowq.errors import UnsupportedModuleError
from glowq.models.forward import example_inputs
from glowq.models.tracing import trace_groups
from glowq.runtime.attach import attached, attached_factors
from support.cli import call, result_of
from support.kinds import EXPERTS, IMAGES, SIZES, SOUND, SPEECH, deberta, llava, load, save
from support.tiny import CALIBRATION, TEXTS

pytestmark = pytest.mark.filterwarnings("ignore::glowq.errors.NoGradientWarning")

IDS = torch.arange(5, 29).reshape(2, 12)


def output(model: Any) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=IDS)
    return found.logits if "logits" in found else found.last_hidden_state


@pytest.mark.parametrize("base", ["torchao-int4", "nf4"])
def test_factors_keep_their_names_where_the_files_have_others(base: str, tmp_path: Path) -> None:
    """transformers renamed them with the weights on saving, so that the saved model could not be loaded."""
    kind = AutoModelForImageTextToText
    model = load(kind, save(llava(), kind, tmp_path / "source"), base)
    expected, factors = output(model), factor_tensors(attached_factors(model))
    model.save_pretrained(tmp_path / "full")
    with safe_open(tmp_path / "full" / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    assert set(factors) <= stored
    renamed = stored - set(factors) - set(model.state_dict())
    assert renamed, "the files have the names of memory: this model no longer tests anything"
    again = load(kind, tmp_path / "full")
    assert torch.equal(output(again), expected)
    assert len(attached(again)) == len(attached(model))
    done = call("verify", tmp_path / "full")
    assert done.exit_code == 0, done.stderr


def test_a_reference_that_cannot_run_from_disk_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = save(deberta(), AutoModel, tmp_path / "source")
    with caplog.at_level(logging.WARNING, logger="glowq"):
        model = load(AutoModel, source, "torchao-int4", method="qera")
    lines = [record.getMessage() for record in caplog.records if "stay in memory" in record.getMessage()]
    assert len(lines) == 1
    assert "DebertaV2Model uses weights of layers that it does not call: " in lines[0]
    dense, corrected = output(AutoModel.from_pretrained(source)), output(model)
    with glowq.disabled(model):
        quantized = output(model)
    assert (corrected - dense).norm() < (quantized - dense).norm()


def test_modules_that_compute_something_else_than_a_product_are_left_out(tmp_path: Path) -> None:
    """The router of PhiMoE is an nn.Linear that returns a tuple, and keeps its forward in a quantized model."""
    config = AutoConfig.for_model("phimoe", **SIZES, **EXPERTS)
    source = save(config, AutoModelForCausalLM, tmp_path / "source")
    model = load(AutoModelForCausalLM, source, "torchao-int4")
    plain = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=glowq.GlowQConfig(base="torchao-int4").base
    )
    skipped = trace_groups(plain, example_inputs(plain)).skipped
    assert {name: skipped[name] for name in skipped if "router" in name} == {
        f"model.layers.{layer}.mlp.router": "its output is a tuple, not W x + b" for layer in range(2)
    }
    assert attached(model)
    assert not any("router" in name for name in attached(model))
    with glowq.disabled(model):
        assert torch.equal(output(model), output(plain))


class Doubled(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


Doubled.__module__ = "transformers_modules.doubled"  # as custom code from the Hub is named


def test_values_are_compared_where_the_models_own_code_computes(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(save(AutoConfig.for_model("llama", **SIZES), AutoModel, tmp_path))
    layer = model.layers[0].self_attn.q_proj
    layer.__class__ = Doubled
    from glowq.quantizers.loading.dense import mark_dense

    mark_dense(model)
    skipped = trace_groups(model, example_inputs(model)).skipped
    assert skipped == {"layers.0.self_attn.q_proj": "its output differs from W x + b by 100%"}


def test_weights_without_an_error_are_refused(tmp_path: Path) -> None:
    """Where only experts hold quantized values that glowq cannot reach, attention got a correction of zeros."""
    config = AutoConfig.for_model("llama4_text", **SIZES, num_key_value_heads=2, head_dim=16, num_local_experts=4)
    source = save(config, AutoModelForCausalLM, tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "experts" in name and weight.dim() == 3:
                weight.copy_((weight * 32).round() / 32)
    model.save_pretrained(tmp_path / "rounded")
    rounded, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "rounded"),
        AutoTokenizer.from_pretrained(source),
    )
    options = {"calibration": TEXTS, "tokenizer": tokenizer, "dense": True, "rank": 4, **CALIBRATION}
    with pytest.raises(UnsupportedModuleError, match=r"the weights of all \d+ groups equal the reference's: .*experts"):
        glowq.correct(rounded, reference=source, **options)
    assert not attached(rounded)


@pytest.mark.parametrize(
    ("kind", "config", "groups"),
    [
        ("AutoModelForImageClassification", lambda: AutoConfig.for_model("vit", **IMAGES), 4 * 2 + 1),
        ("AutoModel", lambda: AutoConfig.for_model("hubert", **SOUND), 4 * 2 + 1),
        ("AutoModelForSpeechSeq2Seq", lambda: AutoConfig.for_model("whisper", **SPEECH), 4 * 2 + 7 * 2 + 1),
    ],
)
def test_groups_of_models_of_images_and_sound(kind: str, config: Any, groups: int, tmp_path: Path) -> None:
    """`glowq groups` ended in an AttributeError from deep inside."""
    source = save(config(), getattr(transformers, kind), tmp_path / "source")
    found = result_of("groups", source)["groups"]
    assert len(found) == groups, [group["name"] for group in found]
    assert any(len(group["members"]) == 3 for group in found)  # q, k, v
