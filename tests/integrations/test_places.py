"""Bases that lie in a subfolder, or whose weights are stored as a variant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import glowq
from glowq.errors import ConfigError, ModelNotFoundError, UnsafePathError
from support.tiny import CALIBRATION, CHEAP, TEXTS, gap, load, logits, quantized, tiny_llama

BASE = "nf4"
OPTIONS: dict[str, Any] = {"calibration": TEXTS, "rank": 4, **CHEAP, **CALIBRATION}
PLACES = [{"subfolder": "llm"}, {"variant": "fp16"}, {"subfolder": "llm/inner", "variant": "fp16"}]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("places") / "plain", num_hidden_layers=1)


def placed(plain: Path, folder: Path, *, subfolder: str = "", variant: str = "") -> Path:
    """A copy of a model whose files lie in a subfolder, and whose weights have a variant's name, beside other ones."""
    inner = folder / subfolder
    shutil.copytree(plain, inner)
    if variant:
        (inner / "model.safetensors").rename(inner / f"model.{variant}.safetensors")
        tiny_llama(folder.parent / "others", seed=7, num_hidden_layers=1)
        shutil.copy(folder.parent / "others" / "model.safetensors", inner)
    return folder


@pytest.mark.parametrize("of_hub", [False, True], ids=["folder", "hub"])
@pytest.mark.parametrize("place", PLACES, ids=["subfolder", "variant", "both"])
def test_the_base_is_found_again(place: dict[str, str], of_hub: bool, plain: Path, tmp_path: Path, hub: Any) -> None:
    source = str(placed(plain, tmp_path / "base", **place))
    if of_hub:
        hub("me/base", tmp_path / "base")
        source = "me/base"
    expected = quantized(plain, BASE)
    tokenizer = AutoTokenizer.from_pretrained(plain)
    glowq.correct(expected, reference=plain, tokenizer=tokenizer, **OPTIONS)

    model = quantized(source, BASE, **place)
    correction = glowq.correct(model, reference=plain, tokenizer=tokenizer, **place, **OPTIONS)
    correction.save_pretrained(tmp_path / "correction")
    assert gap(load(tmp_path / "correction"), logits(expected)) == 0.0
    stored = json.loads((tmp_path / "correction" / "config.json").read_text())["quantization_config"]["base_model"]
    assert {name: stored.get(name) for name in ("subfolder", "variant")} == {"subfolder": None, "variant": None} | place
    assert (stored["revision"] is not None) == of_hub

    now = load(source, quantization_config=glowq.GlowQConfig(base=BASE, **OPTIONS), **place)
    assert {name: now.config.quantization_config.base_model.get(name) for name in stored} == stored
    assert gap(now, logits(expected)) == 0.0


@pytest.mark.parametrize("of_hub", [False, True], ids=["folder", "hub"])
def test_a_correction_can_lie_in_a_subfolder(of_hub: bool, plain: Path, tmp_path: Path, hub: Any) -> None:
    model = quantized(plain, BASE)
    correction = glowq.correct(model, reference=plain, tokenizer=AutoTokenizer.from_pretrained(plain), **OPTIONS)
    hub("me/plain", plain)
    correction.config.base_model = {**(correction.config.base_model or {}), "name": "me/plain"}
    correction.save_pretrained(tmp_path / "repository" / "corrections" / "small")
    source = str(tmp_path / "repository")
    if of_hub:
        hub("me/corrections", tmp_path / "repository")
        source = "me/corrections"
    assert gap(load(source, subfolder="corrections/small"), logits(model)) == 0.0
    assert glowq.Correction.from_pretrained(source, subfolder="corrections/small").ranks == correction.ranks
    other = quantized(plain, BASE)
    glowq.load_correction(other, source, subfolder="corrections/small")
    assert gap(other, logits(model)) == 0.0


def test_a_subfolder_that_correct_was_not_told_is_noticed_before_the_work(plain: Path, tmp_path: Path) -> None:
    source = placed(plain, tmp_path / "base", subfolder="llm")
    model = quantized(source, BASE, subfolder="llm")
    with pytest.raises(ConfigError, match=r"config\.json does not exist.*give the same one.*subfolder="):
        glowq.correct(model, reference=plain, tokenizer=AutoTokenizer.from_pretrained(plain), **OPTIONS)


def test_a_reference_may_be_the_only_variant_of_a_folder(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "reference")
    (tmp_path / "reference" / "model.safetensors").rename(tmp_path / "reference" / "model.bf16.safetensors")
    model, tokenizer = quantized(plain, BASE), AutoTokenizer.from_pretrained(plain)
    found = glowq.correct(model, reference=tmp_path / "reference", tokenizer=tokenizer, **OPTIONS)
    glowq.detach(model)
    assert found.ranks == glowq.correct(model, reference=plain, tokenizer=tokenizer, **OPTIONS).ranks
    shutil.copy(plain / "model.safetensors", tmp_path / "reference" / "model.fp16.safetensors")
    (tmp_path / "reference" / "model.safetensors").unlink(missing_ok=True)
    glowq.detach(model)
    with pytest.raises(ModelNotFoundError, match="as the variants bf16, fp16; name the one that was quantized"):
        glowq.correct(model, reference=tmp_path / "reference", tokenizer=tokenizer, **OPTIONS)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ({"subfolder": "../other"}, UnsafePathError),
        ({"variant": "../fp16"}, UnsafePathError),
        ({"subfolder": "/etc"}, ConfigError),
        ({"subfolder": "*"}, ConfigError),
        ({"variant": 16}, ConfigError),
        ({"subfolder": "missing"}, ModelNotFoundError),
    ],
    ids=str,
)
def test_a_strangers_place_leads_nowhere_else(place: dict[str, Any], error: Any, plain: Path, tmp_path: Path) -> None:
    model = quantized(plain, BASE)
    correction = glowq.correct(model, reference=plain, tokenizer=AutoTokenizer.from_pretrained(plain), **OPTIONS)
    correction.save_pretrained(tmp_path / "correction")
    config = tmp_path / "correction" / "config.json"
    stored = json.loads(config.read_text())
    stored["quantization_config"]["base_model"].update(place)
    config.write_text(json.dumps(stored))
    with pytest.raises(error):
        load(tmp_path / "correction")
