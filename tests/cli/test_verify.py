"""`glowq verify` compares the change of the answers with the one that was recorded when the correction was made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import glowq
from glowq.errors import NonFiniteError
from glowq.runtime.attach import attached
from support.cli import call, result_of
from support.tiny import CHEAP, correct, corrected, logits, quantized, tiny_llama


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    tiny_llama(folder / "model", num_hidden_layers=1, initializer_range=0.2)
    model, correction = corrected(folder / "model", "torchao-int4", **{**CHEAP, "rank": 16})
    correction.save_pretrained(folder / "correction")
    model.save_pretrained(folder / "full")
    correction.cut(rank=4).save_pretrained(folder / "cut")
    return folder


def changed(folder: Path, target: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a correction with other figures and factors, and without checksums, as glowq 0.1 wrote them."""
    target.mkdir()
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "glowq.safetensors")
    for group in config["quantization_config"]["groups"].values():
        del group["sha256"]
    change(config["quantization_config"]["provenance"], tensors)
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "glowq.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("form", ["correction", "full"])
def test_headers_alone_tell_what_is_there(saved: Path, form: str) -> None:
    found, whole = result_of("verify", saved / form, "--headers"), result_of("verify", saved / form)
    same = ("groups", "factor_bytes", "base_model", "fingerprint")
    assert [found[name] for name in same] == [whole[name] for name in same]
    assert (found["headers_only"], whole["headers_only"]) == (True, False)


def test_headers_alone_show_a_factor_that_is_missing_and_one_of_another_rank(saved: Path, tmp_path: Path) -> None:
    name = next(name for name in load_file(saved / "correction" / "glowq.safetensors") if name.endswith(".left"))

    def cut(_: Any, tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:, :-1].contiguous()

    missing = changed(saved / "correction", tmp_path / "missing", lambda _, tensors: tensors.pop(name))
    misshaped = changed(saved / "correction", tmp_path / "misshaped", cut)
    assert f"factor {name!r} is missing" in call("verify", missing, "--headers").stderr
    assert f"factor {name!r} in" in call("verify", misshaped, "--headers").stderr


@pytest.mark.parametrize("form", ["correction", "full"])
def test_a_whole_correction_changes_as_much_as_when_it_was_made(saved: Path, form: str) -> None:
    found = result_of("verify", saved / form)
    assert found["change"] > 1e-4
    assert found["change"] == pytest.approx(found["recorded_change"], rel=0.05)


@pytest.mark.usefixtures("half_products")  # transformers' own forward computes in the model's bfloat16
def test_the_change_is_the_divergence_of_the_two_answers(saved: Path) -> None:
    """The oracle is the KL divergence of transformers' own logits."""
    model = AutoModelForCausalLM.from_pretrained(saved / "full")
    ids = torch.randint(4096, (2, 16), generator=torch.Generator().manual_seed(0))
    given = logits(model, ids).double().log_softmax(-1)
    glowq.detach(model)
    plain = logits(model, ids).double().log_softmax(-1)
    expected = float((plain.exp() * (plain - given)).sum(-1).mean())
    assert result_of("verify", saved / "full")["change"] == pytest.approx(expected, rel=1e-3)


DAMAGE: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]] = {
    "factors times 8": lambda facts, tensors: [tensors[name].mul_(8) for name in tensors if name.endswith(".left")],
    "factors of zero": lambda facts, tensors: [tensors[name].zero_() for name in tensors if name.endswith(".left")],
    "another record": lambda facts, tensors: facts.update(change=3 * facts["change"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_another_change_is_refused(saved: Path, damage: str, tmp_path: Path) -> None:
    done = call("verify", changed(saved / "correction", tmp_path / "changed", DAMAGE[damage]))
    assert done.exit_code == 1
    assert "the correction changes the answers by" in done.stderr
    assert "when it was made" in done.stderr


def test_what_was_not_measured_is_not_compared(saved: Path, tmp_path: Path) -> None:
    assert result_of("verify", saved / "cut")["recorded_change"] is None
    AutoModel.from_pretrained(saved / "full").save_pretrained(tmp_path / "inner")
    assert result_of("verify", tmp_path / "inner")["recorded_change"] is None
    model = quantized(saved / "model", "torchao-int4")
    correct(model, saved / "model", **CHEAP)
    assert model.config.quantization_config.provenance.change > 0


def test_a_model_that_cannot_be_run_on_the_tokens_is_left_as_it_was(saved: Path) -> None:
    model = quantized(saved / "model", "torchao-int4")
    before = logits(model)
    of_the_check = (2, 16)  # tokens; the calibration has longer sequences

    def spoil(layer: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * torch.nan if args[0].shape[:2] == of_the_check else output

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match="its answers hold NaN or Inf"):
        correct(model, saved / "model", **CHEAP)
    assert not attached(model)
    assert torch.equal(logits(model), before)
