"""Partly quantized models: skipped modules, biases, tied heads, Conv1D, several settings in one model, any dtype."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTQConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    TorchAoConfig,
)
from transformers.pytorch_utils import Conv1D

import glowq
from glowq.quantizers.model import prepare_model, quantized_modules
from glowq.runtime.attach import attached_factors
from support import writers
from support.bases import rows, small_model
from support.tiny import CALIBRATION, CHEAP, SHAPE, TEXTS, VOCABULARY, gap, load, logits, seeded

SETTINGS = {**SHAPE, "initializer_range": 0.1}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SETTINGS)),
    "llama-bias": lambda: LlamaForCausalLM(LlamaConfig(**SETTINGS, attention_bias=True, mlp_bias=True)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SETTINGS, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SETTINGS)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**VOCABULARY, n_layer=2, n_embd=128, n_head=4, n_positions=512)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            **VOCABULARY, **HEADS, hidden_size=128, ffn_dim=256, word_embed_proj_dim=128, do_layer_norm_before=True
        )
    ),
    "bert": lambda: BertForMaskedLM(
        BertConfig(**VOCABULARY, **HEADS, hidden_size=128, intermediate_size=256, is_decoder=False)
    ),
}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that returns the folder of a full-precision model with random biases and the bundled tokenizer."""
    made: dict[str, Path] = {}

    def folder(kind: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        key = f"{kind}-{dtype}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(kind)
            with seeded(0):
                model = KINDS[kind]().to(dtype)
                for name, parameter in model.named_parameters():
                    if name.endswith("bias"):
                        parameter.data.normal_(std=0.1)
            model.save_pretrained(made[key])
            AutoTokenizer.from_pretrained(small_model()).save_pretrained(made[key])
        return made[key]

    return folder


def correct(model: Any, reference: Path, **options: Any) -> glowq.Correction:
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    settings = {"calibration": TEXTS, "tokenizer": tokenizer, "rank": 4, **CALIBRATION, **options}
    return glowq.correct(model, reference=reference, **settings)


def state(model: Any, names: set[str]) -> dict[str, Tensor]:
    """Copy all parameters except the factors and the quantized weights of `names`."""
    return {
        key: value.detach().clone()
        for key, value in model.named_parameters()
        if "glowq_" not in key and (key.rpartition(".")[0] not in names or key.endswith(".bias"))
    }


def check(model: Any, reference: Path, folder: Path, opened: Callable[[Any], Any] = load) -> glowq.Correction:
    """Correct a model, save both forms and load each again. Assert equal logits and no change of other parameters.

    Args:
        opened: loads a saved form.
    """
    expected = set(quantized_modules(model))
    before = state(model, expected)
    prepare_model(model)
    correction = correct(model, reference, **CHEAP)
    members = {member for entry in attached_factors(model) for member in entry.lefts}
    assert members == expected
    after = state(model, expected)
    assert before.keys() == after.keys()
    # At its first forward, Linear4bit rounds its bias to its compute dtype, with or without glowq.
    assert [key for key in before if not torch.equal(before[key].to(after[key].dtype), after[key])] == []
    assert {f.dtype for e in attached_factors(model) for f in (e.right, *e.lefts.values())} == {model.dtype}
    wanted = logits(model)
    assert torch.isfinite(wanted).all()
    with glowq.disabled(model):
        plain = logits(model)
    assert not torch.equal(plain, wanted)
    correction.save_pretrained(folder / "correction")
    model.save_pretrained(folder / "full")
    for form in ("correction", "full"):
        again = opened(folder / form)
        assert gap(again, wanted) == 0.0, form
        assert set(quantized_modules(again)) == expected
        glowq.detach(again)
        assert gap(again, plain) == 0.0, form
    return correction


def opener(kind: str) -> Callable[[Any], Any]:
    return BertForMaskedLM.from_pretrained if kind == "bert" else load


def nf4(*skipped: str, **options: Any) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(skipped) or None,
        **options,
    )


def int8(*skipped: str) -> TorchAoConfig:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[f"{name}.weight" for name in skipped] or None)


@pytest.mark.parametrize("quantizer", [nf4, int8], ids=["nf4", "torchao-int8"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gpt2"])
def test_every_architecture(full: Any, kind: str, quantizer: Any, tmp_path: Path) -> None:
    model = opener(kind)(full(kind), quantization_config=quantizer())
    check(model, full(kind), tmp_path, opener(kind))


def test_conv1d_of_gpt2(full: Any, tmp_path: Path) -> None:
    model = load(full("gpt2"), quantization_config=nf4())
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    correction = check(model, full("gpt2"), tmp_path)
    shapes = {member: shape for entry in correction.factors for member, shape in entry.group.shapes.items()}
    assert shapes["transformer.h.0.attn.c_attn"] == (384, 128)
    assert "lm_head" not in shapes


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2"])
@pytest.mark.parametrize("quantizer", [nf4, int8], ids=["nf4", "torchao-int8"])
def test_a_group_of_which_a_part_is_quantized(full: Any, kind: str, quantizer: Any, tmp_path: Path) -> None:
    skipped = ["v_proj", "down_proj", "lm_head"]
    model = load(full(kind), quantization_config=quantizer(*skipped))
    correction = check(model, full(kind), tmp_path)
    members = {entry.group.members for entry in correction.factors if "self_attn" in entry.group.name}
    assert ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj") in members
    assert not any(member.endswith(tuple(skipped)) for group in members for member in group)


@pytest.mark.parametrize("kind", ["llama", "llama-bias"])
def test_a_quantized_head_is_corrected_as_well(full: Any, kind: str, tmp_path: Path) -> None:
    model = load(full(kind), quantization_config=nf4("v_proj"))
    assert "lm_head" in quantized_modules(model)
    correction = check(model, full(kind), tmp_path)
    assert ("lm_head",) in {entry.group.members for entry in correction.factors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantizer", [nf4, int8], ids=["nf4", "torchao-int8"])
def test_factors_are_of_the_models_dtype(full: Any, quantizer: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = full("llama-bias", dtype)
    model = load(folder, dtype=dtype, quantization_config=quantizer("v_proj"))
    correction = check(model, folder, tmp_path, partial(load, dtype=dtype))
    stored = load_file(tmp_path / "correction" / "glowq.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype} == {e.right.dtype for e in correction.factors}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("base", rows("gptq-4"))
def test_gptq_inside_of_blocks_alone(base: Any, full: Any, tmp_path: Path) -> None:
    inside = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up_proj"]]
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    ids = tokenizer("".join(writers.TEXTS), return_tensors="pt").input_ids[:, :512].reshape(-1, 128)
    dataset = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    config = GPTQConfig(bits=4, group_size=64, dataset=dataset, backend="torch", modules_in_block_to_quantize=inside)
    model = load(full("llama-bias"), quantization_config=config)
    model.config.quantization_config.dataset = None
    model.save_pretrained(tmp_path / "gptq")
    saved = load(tmp_path / "gptq")
    names = {name.rpartition(".")[2] for name in quantized_modules(saved)}
    assert names == {"q_proj", "k_proj", "up_proj"}
    correction = check(saved, full("llama-bias"), tmp_path)
    assert {len(entry.group.members) for entry in correction.factors} == {1, 2}


@pytest.mark.parametrize("base", rows("w4a16"))
def test_two_settings_in_one_model(base: Any, tmp_path: Path) -> None:
    folder, wide = tmp_path / "mixed", tmp_path / "wide"
    writers.compressed_tensors(
        small_model(), folder, num_bits=4, strategy="group", group_size=64, ignore=["re:.*o_proj"]
    )
    writers.compressed_tensors(small_model(), wide, num_bits=8, strategy="channel")
    configs = [json.loads((place / "config.json").read_text()) for place in (folder, wide)]
    groups = [config["quantization_config"]["config_groups"]["group_0"] for config in configs]
    tensors = {key: value for key, value in load_file(folder / "model.safetensors").items() if ".v_proj." not in key}
    tensors |= {key: value for key, value in load_file(wide / "model.safetensors").items() if ".v_proj." in key}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    by_pattern = {"a": groups[0], "b": {**groups[1], "targets": [r"re:.*v_proj$"]}}
    configs[0]["quantization_config"]["config_groups"] = by_pattern
    (folder / "config.json").write_text(json.dumps(configs[0]))
    model = load(folder)
    found = {name: b.scheme(model.get_submodule(name)).bits for name, b in quantized_modules(model).items()}
    assert {bits for name, bits in found.items() if "v_proj" in name} == {8}
    assert {bits for name, bits in found.items() if "v_proj" not in name} == {4}
    assert not any("o_proj" in name for name in found)
    correction = check(model, small_model(), tmp_path / "out")
    group = next(entry.group for entry in correction.factors if "layers.0.self_attn" in entry.group.name)
    assert [member.rpartition(".")[2] for member in group.members] == ["q_proj", "k_proj", "v_proj"]
