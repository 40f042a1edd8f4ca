"""The dense model with W' = Q + A B, from `dequantize()` in memory and from `glowq export --to merged` on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import glowq
from glowq.errors import ConfigError, ExportError, NonFiniteError
from glowq.integrations.export.registry import export
from glowq.quantizers.model import quantized_modules
from support import bases
from support.cli import call, result_of
from support.fresh_process import run_python
from support.tiny import correct, corrected, gap, load, logits, quantized, tiny_llama

pytestmark = pytest.mark.usefixtures("uncompiled")

HALF_STEP = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-23}  # relative; doubled for float32 arithmetic


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("source") / "llama", attention_bias=True, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def saved(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model, correction = corrected(source, "nf4")
    correction.save_pretrained(folder / "correction")
    model.save_pretrained(folder / "full")
    return folder


def oracle(
    model: nn.Module, dequantize: Callable[[nn.Module], Tensor], correction: glowq.Correction
) -> dict[str, Tensor]:
    """Return Q + A B in float64, where the quantization library dequantizes Q."""
    return {
        member: dequantize(model.get_submodule(member)).double() + left.double() @ entry.right.double()
        for entry in correction.factors
        for member, left in entry.lefts.items()
    }


@pytest.mark.parametrize("form", ["correction", "full"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_weights_are_rounded_once(source: Path, saved: Path, form: str, dtype: str, tmp_path: Path) -> None:
    facts = export(str(saved / form), "merged", tmp_path / "dense", dtype=dtype)
    correction = glowq.Correction.from_pretrained(saved / "correction")
    (nf4,) = (base for base in bases.BASES if base.name == "nf4")
    expected = oracle(quantized(source, "nf4"), nf4.dequantize, correction)
    found = load_file(tmp_path / "dense" / "model.safetensors")
    for member, weight in expected.items():
        stored = found[f"{member}.weight"]
        assert str(stored.dtype) == f"torch.{dtype}"
        assert bool(((stored.double() - weight).abs() <= HALF_STEP[dtype] * weight.abs() + 2**-25).all()), member
    assert facts["check"]["weight_error"] <= 1
    assert facts["weight_bytes"] == sum(tensor.nbytes for tensor in found.values())


def test_the_rest_of_the_model_is_there(source: Path, saved: Path, tmp_path: Path) -> None:
    export(str(saved / "correction"), "merged", tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    assert (tmp_path / "dense" / "generation_config.json").is_file()
    text = "def area(width):"
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")(text) == AutoTokenizer.from_pretrained(source)(text)
    reference, found = load_file(source / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    assert found.keys() == reference.keys()
    for name in (name for name in reference if not name.endswith("_proj.weight")):
        assert torch.equal(found[name], reference[name].to(torch.bfloat16)), name


def test_it_loads_where_glowq_is_not_imported(saved: Path, tmp_path: Path) -> None:
    facts = export(str(saved / "correction"), "merged", tmp_path / "dense", dtype="float32")
    code = f"""
import sys, torch, warnings
warnings.simplefilter("error", UserWarning)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "dense")!r})
assert not {{"glowq", "bitsandbytes"}} & set(sys.modules) and type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
"""
    run_python("-c", code, check=True)
    model = load(saved / "correction")
    with glowq.disabled(model):
        effect = gap(load(tmp_path / "dense"), logits(model).float())
    # The corrected model's kernel computes in bfloat16.
    assert gap(load(tmp_path / "dense"), logits(model).float()) < 0.5 * effect
    assert facts["check"]["relative_difference"] < 0.02


def test_two_exports_are_the_same_files(saved: Path, tmp_path: Path) -> None:
    for name in ("first", "again"):
        facts = export(str(saved / "correction"), "merged", tmp_path / name)
    for file in facts["files"]:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


@pytest.mark.parametrize("base", bases.rows("int8", "torchao-int3", "quanto-int4", "hqq-4", "w4a16", "w4a16-asym"))
def test_every_base(base: bases.Base, tmp_path: Path) -> None:
    source = bases.small_model() if base.is_preset else base.checkpoint(bases.small_model())
    dtype = torch.float32
    model = quantized(source, base.name, dtype=dtype) if base.is_preset else load(source, dtype=dtype)
    weights = {name: base.dequantize(model.get_submodule(name)).double() for name in quantized_modules(model)}
    correction = correct(model, bases.small_model(), tokenizer=AutoTokenizer.from_pretrained(bases.small_model()))
    correction.save_pretrained(tmp_path / "correction")
    facts = export(str(tmp_path / "correction"), "merged", tmp_path / "dense", dtype="float32")
    found = load_file(tmp_path / "dense" / "model.safetensors")
    for entry in correction.factors:
        for member, left in entry.lefts.items():
            weight = weights[member] + left.double() @ entry.right.double()
            assert float((found[f"{member}.weight"] - weight).abs().max()) < 1e-6 * float(weight.abs().max()), member
    assert facts["check"]["relative_difference"] < 0.02


@pytest.mark.parametrize("base", ["nf4", "none"])
def test_conv1d_keeps_its_orientation(base: str, tmp_path: Path) -> None:
    """GPT-2 stores its weights transposed; bitsandbytes does not."""
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 4096}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(bases.MODEL).save_pretrained(tmp_path / "gpt2")
    if base == "none":
        model = load(tmp_path / "gpt2")
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "h." in name and weight.dim() == 2:
                    weight.copy_((weight * 32).round() / 32)
        model.save_pretrained(tmp_path / "rounded")
        model = load(tmp_path / "rounded")
    else:
        model = quantized(tmp_path / "gpt2", base)
    correct(model, tmp_path / "gpt2", dense=base == "none").save_pretrained(tmp_path / "correction")
    export(str(tmp_path / "correction"), "merged", tmp_path / "dense", dtype="float32")
    dense = load(tmp_path / "dense")
    assert type(dense.transformer.h[0].attn.c_proj).__name__ == "Conv1D"
    with glowq.disabled(model):
        effect = gap(dense, logits(model))
    assert gap(dense, logits(model)) < (1e-5 if base == "none" else 0.5 * effect)


def test_a_group_that_is_switched_off_is_not_folded_in(source: Path) -> None:
    model, correction = corrected(source, "nf4")
    off = next(iter(correction.ranks))
    glowq.set_enabled(model, False, groups=[off])
    plain = quantized(source, "nf4").dequantize(torch.float32)
    model.dequantize(torch.float32)
    for entry in correction.factors:
        for member, left in entry.lefts.items():
            added = model.get_submodule(member).weight - plain.get_submodule(member).weight
            expected = 0 * added if entry.group.name == off else left.float() @ entry.right.float()
            torch.testing.assert_close(added, expected, atol=1e-6, rtol=1e-4)


def test_a_weight_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "llama")
    correction = corrected(source, "nf4")[1]
    correction.factors[0].right.mul_(1e9)
    correction.save_pretrained(tmp_path / "correction")
    with pytest.raises(NonFiniteError, match=r"q_proj reaches .*float16 ends at 6\.55e\+04.*--dtype"):
        export(str(tmp_path / "correction"), "merged", tmp_path / "dense", dtype="float16")
    assert not (tmp_path / "dense").exists()


def test_what_cannot_be_merged_is_refused(source: Path, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype must be one of bfloat16, float16, float32, found 'int4'"):
        export(str(saved / "correction"), "merged", tmp_path / "dense", dtype="int4")
    with pytest.raises(ExportError, match="carries no glowq correction"):
        export(str(source), "merged", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_the_command(saved: Path, tmp_path: Path) -> None:
    arguments = ["export", saved / "correction", "--to", "merged", "--output"]
    result = result_of(*arguments, tmp_path / "dense", "--dtype", "float16")
    assert result["dtype"] == "float16"
    assert result["check"]["weight_error"] <= 1
    assert load(tmp_path / "dense").dtype == torch.float16
    shown = call(*arguments, tmp_path / "dense")
    assert shown.exit_code == 0
    assert "as a share of the outputs" in shown.stdout
    assert call(*arguments, tmp_path / "other", "--pad-ranks").exit_code == 2


def test_its_readme_says_what_to_type(saved: Path, tmp_path: Path) -> None:
    export(str(saved / "correction"), "merged", tmp_path / "dense")
    text = (tmp_path / "dense" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("this/repository", str(tmp_path / "dense")), names)
    assert quantized_modules(names["model"]) == {}
    assert str(saved) not in text
