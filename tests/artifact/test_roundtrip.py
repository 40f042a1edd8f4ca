"""A saved model loads bit for bit the same, for every base and both forms, and the same seed writes the same bytes."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

import glowq
from glowq.runtime.attach import attached
from support.tiny import (
    BASES,
    CALIBRATION,
    CHEAP,
    TEXTS,
    correct,
    corrected,
    gap,
    load,
    logits,
    quantized,
    tiny_llama,
)

DTYPES = [(base, torch.bfloat16) for base in BASES]
DTYPES += [(base, dtype) for base in ("nf4", "int8", "torchao-int4") for dtype in (torch.float16, torch.float32)]


@pytest.fixture(params=DTYPES, ids=lambda row: f"{row[0]}-{str(row[1]).removeprefix('torch.')}", scope="module")
def saved(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model corrected while loading, one corrected after loading, the correction, and both forms on disk."""
    base, dtype = request.param
    folder = tmp_path_factory.mktemp("saved")
    config = glowq.GlowQConfig(base=base, rank=4, calibration=TEXTS, **CHEAP, **CALIBRATION)
    model = load(source, quantization_config=config, dtype=dtype)
    after = quantized(source, base, dtype=dtype)
    correction = correct(after, source, **CHEAP)
    correction.save_pretrained(folder / "correction")
    model.save_pretrained(folder / "full")
    return base, dtype, model, after, correction, folder


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """Warnings of transformers, for example about unexpected and missing keys."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_correcting_while_and_after_loading_give_the_same_factors(saved: Any) -> None:
    _, _, model, after, correction, _ = saved
    assert gap(after, logits(model)) == 0.0
    state, _ = model.hf_quantizer.get_state_dict_and_metadata(model)
    for name, tensor in correction.tensors().items():
        assert torch.equal(state[name], tensor), name


def test_the_correction_moves_the_model(saved: Any) -> None:
    model = saved[2]
    before = logits(model)
    with glowq.disabled(model):
        assert gap(model, before) > 0.0
    assert gap(model, before) == 0.0


@pytest.mark.parametrize("form", ["correction", "full"])
def test_loading_back_changes_no_logit(saved: Any, form: str, tmp_path: Path, warned: list[str]) -> None:
    _, dtype, model, _, _, folder = saved
    expected = logits(model)
    loaded = load(folder / form)
    assert loaded.dtype == dtype
    assert gap(loaded, expected) == 0.0
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["format"] == "full"
    assert gap(load(tmp_path / "again"), expected) == 0.0
    assert warned == []


def test_the_full_form_adds_nothing_but_factors(saved: Any, source: Path, tmp_path: Path) -> None:
    base, dtype, _, _, correction, folder = saved
    quantized(source, base, dtype=dtype).save_pretrained(tmp_path)
    plain, full = load_file(tmp_path / "model.safetensors"), load_file(folder / "full" / "model.safetensors")
    assert full.keys() - plain.keys() == correction.tensors().keys()
    assert plain.keys() <= full.keys()
    assert all(torch.equal(plain[name], full[name]) for name in plain)
    assert _metadata(tmp_path / "model.safetensors") == _metadata(folder / "full" / "model.safetensors")


def test_the_correction_holds_nothing_but_factors(saved: Any) -> None:
    correction, folder = saved[4], saved[5] / "correction"
    tensors = load_file(folder / "glowq.safetensors")
    assert tensors.keys() == correction.tensors().keys()
    for entry in correction.factors:
        assert tensors[f"{entry.group.name}.right"].shape == (entry.rank, entry.group.in_features)
        for member, width in zip(entry.group.members, entry.group.out_features, strict=True):
            assert tensors[f"{member}.left"].shape == (width, entry.rank)


def _metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        found = dict(file.metadata())
    names = found.pop("tensor_names", "[]")
    return {**found, "tensor_names": sorted(json.loads(names))}


@pytest.mark.parametrize("base", ["nf4", "torchao-int4"])
def test_a_quantized_folder_is_the_base_of_its_correction(base: str, source: Path, tmp_path: Path) -> None:
    quantized(source, base).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(source)
    correction = glowq.correct(model, reference=source, calibration=TEXTS, tokenizer=tokenizer, rank=4, **CALIBRATION)
    correction.save_pretrained(tmp_path / "correction")
    model.save_pretrained(tmp_path / "full")
    assert correction.config.base_model is not None
    assert correction.config.base_model["name"] == str(tmp_path / "base")
    for form in ("correction", "full"):
        assert gap(load(tmp_path / form), logits(model)) == 0.0


@pytest.mark.parametrize("base", ["nf4-double", "torchao-int3"])
def test_shards(base: str, source: Path, tmp_path: Path) -> None:
    load(source).save_pretrained(tmp_path / "source", max_shard_size="1MB")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "source")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    model, correction = corrected(tmp_path / "source", base)
    correction.save_pretrained(tmp_path / "correction")
    model.save_pretrained(tmp_path / "full", max_shard_size="1MB")
    assert len(list((tmp_path / "full").glob("*.safetensors"))) > 1
    for form in ("correction", "full"):
        assert gap(load(tmp_path / form), logits(model)) == 0.0


@pytest.mark.parametrize("base", ["nf4", "int8", "torchao-int4"])
def test_tied_embeddings(base: str, tmp_path: Path) -> None:
    model, correction = corrected(tiny_llama(tmp_path / "tied", tie_word_embeddings=True), base)
    correction.save_pretrained(tmp_path / "correction")
    model.save_pretrained(tmp_path / "full")
    for form in ("correction", "full"):
        loaded = load(tmp_path / form)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert gap(loaded, logits(model)) == 0.0


def test_a_model_with_biases(tmp_path: Path) -> None:
    model, correction = corrected(tiny_llama(tmp_path / "biased", attention_bias=True, mlp_bias=True), "nf4")
    correction.save_pretrained(tmp_path / "correction")
    assert gap(load(tmp_path / "correction"), logits(model)) == 0.0


@pytest.mark.parametrize("base", ["nf4", "torchao-int2"])
def test_one_seed_gives_the_same_bytes_and_another_gives_others(base: str, source: Path, tmp_path: Path) -> None:
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        corrected(source, base, seed=seed)[1].save_pretrained(tmp_path / name)
    for file in ("glowq.safetensors", "config.json", "README.md"):
        first, again, other = ((tmp_path / name / file).read_bytes() for name in ("first", "again", "other"))
        assert first == again, file
        assert file == "README.md" or first != other, file


def test_a_correction_saved_over_itself_is_unchanged(source: Path, tmp_path: Path) -> None:
    _, correction = corrected(source, "nf4")
    correction.save_pretrained(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    glowq.Correction.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_global_random_states_are_left_alone(source: Path, tmp_path: Path) -> None:
    model = quantized(source, "nf4")
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    glowq.correct(model, reference=source, calibration=TEXTS, tokenizer=tokenizer, rank=4, **CALIBRATION)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_factors_stay_out_of_the_trainable_parameters(source: Path) -> None:
    model, _ = corrected(source, "nf4")
    assert attached(model)
    assert not any("glowq" in name and parameter.requires_grad for name, parameter in model.named_parameters())
