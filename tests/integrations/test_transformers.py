"""A corrected model is a transformers model: it can be run, copied and saved, and its config describes it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, pipeline
from transformers.quantizers.base import HfQuantizer

import glowq
from glowq.errors import ConfigError, FingerprintError, ReferenceMismatchError, UnsafePathError
from glowq.integrations.transformers.delegation import DelegatingHfQuantizer
from glowq.integrations.transformers.saving import CorrectedHfQuantizer
from glowq.quantizers.model import quantized_modules, read_weight
from glowq.quantizers.registry import find_backend
from glowq.runtime.attach import attached
from support.corrections import changed
from support.tiny import BASES, CALIBRATION, TEXTS, corrected, gap, load, logits, quantized, tiny_llama

COMMIT = "a" * 40
OTHER_COMMIT = "b" * 40


@pytest.fixture(scope="module")
def saved(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, glowq.Correction, Path]:
    folder = tmp_path_factory.mktemp("saved")
    model, correction = corrected(source, "nf4", rank=8)
    correction.save_pretrained(folder / "correction")
    model.save_pretrained(folder / "full")
    return model, correction, folder


@pytest.fixture(params=["correction", "full"])
def loaded(saved: Any, request: pytest.FixtureRequest) -> Any:
    return load(saved[2] / request.param)


@pytest.mark.parametrize("base", BASES)
def test_the_quantizer_answers_as_the_base_and_the_config_as_glowq(base: str, source: Path, tmp_path: Path) -> None:
    model, correction = corrected(source, base)
    correction.save_pretrained(tmp_path / "correction")
    plain = quantized(source, base)
    for found in (model, load(tmp_path / "correction")):
        assert isinstance(found.hf_quantizer, CorrectedHfQuantizer)
        method = plain.hf_quantizer.quantization_config.quant_method
        assert found.hf_quantizer.quantization_config.quant_method == method
        assert found.quantization_method == plain.quantization_method
        assert found.config.quantization_config.to_dict()["quant_method"] == "glowq"
        assert json.loads(found.config.to_json_string())["quantization_config"]["quant_method"] == "glowq"
        for name in ("is_trainable", "is_qat_trainable", "is_compileable", "quantized_element_size"):
            assert getattr(found.hf_quantizer, name) == getattr(plain.hf_quantizer, name), name
        assert found.hf_quantizer.is_serializable() == plain.hf_quantizer.is_serializable()
    assert "glowq" in repr(model.config.quantization_config)


def test_every_public_attribute_of_a_quantizer_is_answered() -> None:
    own = vars(CorrectedHfQuantizer) | vars(DelegatingHfQuantizer)
    inherited = {"requires_calibration", "remove_quantization_config", "get_modules_to_not_convert"}
    assert {name for name in vars(HfQuantizer) if not name.startswith("_")} <= own.keys() | inherited


def test_load_correction_onto_a_model_in_memory(saved: Any, source: Path, tmp_path: Path) -> None:
    model, _, folder = saved
    other = quantized(source, "nf4")
    correction = glowq.load_correction(other, folder / "correction")
    assert correction.ranks == saved[1].ranks
    assert gap(other, logits(model)) == 0.0
    other.save_pretrained(tmp_path / "full")
    assert gap(load(tmp_path / "full"), logits(model)) == 0.0


def test_a_saved_correction_is_attached_while_quantizing(saved: Any, source: Path) -> None:
    config = glowq.GlowQConfig(base="nf4", correction=str(saved[2] / "correction"))
    assert gap(load(source, quantization_config=config), logits(saved[0])) == 0.0


def test_a_budget_cuts_what_is_attached(saved: Any, source: Path, tmp_path: Path) -> None:
    budget = saved[1].factor_bytes // 2
    model = quantized(source, "nf4")
    correction = glowq.load_correction(model, saved[2] / "correction", budget=budget)
    assert 0 < correction.factor_bytes <= budget
    config = glowq.GlowQConfig(base="nf4", correction=str(saved[2] / "correction"), budget=budget)
    assert gap(load(source, quantization_config=config), logits(model)) == 0.0
    model.save_pretrained(tmp_path / "full")
    assert gap(load(tmp_path / "full"), logits(model)) == 0.0


@pytest.mark.parametrize("request_", [{"rank": 3}, {"budget": "8%"}, {"budget": 9000}])
def test_a_cut_keeps_the_first_ranks(saved: Any, request_: dict[str, Any], source: Path, tmp_path: Path) -> None:
    whole = saved[1]
    cut = glowq.Correction.from_pretrained(saved[2] / "correction").cut(**request_)
    assert cut.ranks.keys() <= whole.ranks.keys()
    assert cut.factor_bytes < whole.factor_bytes
    by_name = {entry.group.name: entry for entry in whole.factors}
    for small in cut.factors:
        large = by_name[small.group.name]
        assert 1 <= small.rank <= large.rank
        assert torch.equal(small.right, large.right[: small.rank])
        assert torch.equal(small.gains, large.gains[: small.rank])
        for member in small.group.members:
            assert torch.equal(small.lefts[member], large.lefts[member][:, : small.rank])
    cut.save_pretrained(tmp_path / "cut")
    model = quantized(source, "nf4")
    glowq.load_correction(model, tmp_path / "cut")
    assert gap(load(tmp_path / "cut"), logits(model)) == 0.0


def test_a_correction_of_fewer_groups_is_still_that_models(saved: Any, source: Path, tmp_path: Path) -> None:
    correction = glowq.Correction.from_pretrained(saved[2] / "correction")
    correction.factors = correction.factors[1:]
    few = correction.cut(rank=8)
    few.save_pretrained(tmp_path / "few")
    assert len(attached(load(tmp_path / "few"))) == len(saved[1].factors) - 1


def test_factors_at_full_rank_leave_rounding_only(source: Path) -> None:
    reference = load(source, dtype=torch.float32)
    model = quantized(source, "torchao-int2", dtype=torch.float32)
    before = gap(model, logits(reference))
    calibration = torch.randint(0, 4096, (16, 128), generator=torch.Generator().manual_seed(0))
    glowq.correct(model, reference=reference, calibration=calibration, rank=128)
    assert gap(model, logits(reference)) < 1e-4 * before


@pytest.mark.parametrize("base", ["nf4", "int8", "torchao-int3"])
def test_dequantize_gives_the_dense_oracle(base: str, source: Path, tmp_path: Path) -> None:
    model, correction = corrected(source, base)
    expected = {name: read_weight(backend, name, model.get_submodule(name)) for name, backend in _quantized(model)}
    for entry in correction.factors:
        for member, left in entry.lefts.items():
            expected[member] += left.float() @ entry.right.float()
    before, model = logits(model), model.dequantize()
    for name, weight in expected.items():
        module = model.get_submodule(name)
        assert type(module) is nn.Linear
        assert find_backend(module) is None
        assert torch.equal(module.weight, weight.to(torch.bfloat16)), name
    assert attached(model) == {}
    assert not hasattr(model.config, "quantization_config")
    assert gap(model, before) < 0.1 * float(before.abs().max())
    model.save_pretrained(tmp_path)
    assert gap(load(tmp_path), logits(model)) == 0.0


def _quantized(model: nn.Module) -> Any:
    return quantized_modules(model).items()


def test_generation_is_the_saved_models(saved: Any, loaded: Any) -> None:
    ids = torch.arange(2, 14).unsqueeze(0)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **options), saved[0].generate(ids, **options))


@pytest.mark.parametrize("form", ["correction", "full"])
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
def test_a_device_map_changes_nothing(saved: Any, form: str, device_map: Any) -> None:
    model, _, folder = saved
    assert gap(load(folder / form, device_map=device_map), logits(model)) == 0.0


def test_a_text_generation_pipeline(saved: Any, source: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    text = pipeline("text-generation", model=str(saved[2] / "correction"))("def area(", **options)
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert text == pipeline("text-generation", model=saved[0], tokenizer=tokenizer)("def area(", **options)


def test_a_copy_stands_alone(loaded: Any) -> None:
    expected = logits(loaded)
    copied = copy.deepcopy(loaded)
    assert gap(copied, expected) == 0.0
    glowq.detach(loaded)
    assert gap(loaded, expected) > 0.0
    assert gap(copied, expected) == 0.0
    originals = {id(module) for module in loaded.modules()}
    assert not any(id(module) in originals for module in copied.modules())


def test_a_detached_model_saves_as_its_plain_base(loaded: Any, source: Path, tmp_path: Path) -> None:
    glowq.detach(loaded)
    loaded.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "bitsandbytes"
    assert gap(load(tmp_path), logits(quantized(source, "nf4"))) == 0.0


def test_a_detached_model_is_corrected_again(saved: Any, loaded: Any, source: Path, tmp_path: Path) -> None:
    glowq.detach(loaded)
    tokenizer = AutoTokenizer.from_pretrained(source)
    again = glowq.correct(loaded, reference=source, calibration=TEXTS, tokenizer=tokenizer, rank=8, **CALIBRATION)
    assert again.config.base_model == saved[1].config.base_model
    again.save_pretrained(tmp_path / "again")
    first = (saved[2] / "correction" / "glowq.safetensors").read_bytes()
    assert (tmp_path / "again" / "glowq.safetensors").read_bytes() == first
    assert gap(load(tmp_path / "again"), logits(saved[0])) == 0.0


def test_nothing_is_corrected_twice(saved: Any, source: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    with pytest.raises(ConfigError, match="carries a correction already"):
        glowq.correct(saved[0], reference=source, calibration=TEXTS, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="carries a correction already"):
        glowq.load_correction(saved[0], saved[2] / "correction")


@pytest.mark.parametrize("base", ["fp4", "nf4-double", "int8"])
def test_a_correction_of_another_base_is_refused(saved: Any, base: str, source: Path) -> None:
    model = quantized(source, base)
    with pytest.raises(FingerprintError, match="was made for quantized weights weights-sha256:"):
        glowq.load_correction(model, saved[2] / "correction")
    assert attached(model) == {}


def test_a_correction_of_another_model_is_refused(saved: Any, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(FingerprintError, match="another model, another revision, other quantization settings"):
        glowq.load_correction(quantized(other, "nf4"), saved[2] / "correction")
    with pytest.raises(FingerprintError, match=r"model\.layers\.0.* is not quantized here"):
        glowq.load_correction(load(other), saved[2] / "correction")
    short = tiny_llama(tmp_path / "short", num_hidden_layers=1)
    with pytest.raises(FingerprintError, match=r"no module 'model\.layers\.1"):
        glowq.load_correction(quantized(short, "nf4"), saved[2] / "correction")


def test_a_base_that_changed_under_its_correction_is_refused(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    corrected(source, "nf4")[1].save_pretrained(tmp_path / "correction")
    tiny_llama(source, seed=1)
    with pytest.raises(FingerprintError, match="another revision"):
        load(tmp_path / "correction")


def test_a_hub_repository_names_its_base_and_that_ones_commit(source: Path, tmp_path: Path, hub: Any) -> None:
    hub("me/base", source)
    model = load("me/base", quantization_config=glowq.GlowQConfig(base="nf4", rank=4, calibration=TEXTS, **CALIBRATION))
    stored = model.config.quantization_config.base_model
    assert (stored["name"], stored["revision"]) == ("me/base", COMMIT)
    tokenizer = AutoTokenizer.from_pretrained("me/base")
    other = quantized("me/base", "nf4")
    options = {"calibration": TEXTS, "tokenizer": tokenizer, "rank": 4, **CALIBRATION}
    glowq.correct(other, reference="me/base", **options).save_pretrained(tmp_path / "correction")
    hub("me/correction", tmp_path / "correction")
    assert gap(load("me/correction"), logits(model)) == 0.0
    plain = quantized(source, "nf4")
    glowq.load_correction(plain, "me/correction")
    assert gap(plain, logits(model)) == 0.0


@pytest.mark.parametrize("function", ["from_pretrained", "correct"])
def test_a_pinned_revision_is_the_base(function: str, source: Path, tmp_path: Path, hub: Any) -> None:
    """The base is the pinned revision and not the main branch, whose weights differ."""
    hub("me/base", tiny_llama(tmp_path / "main", seed=5))
    hub("me/base", source, "v2", OTHER_COMMIT)
    options: dict[str, Any] = {"calibration": TEXTS, "rank": 4, **CALIBRATION}
    if function == "from_pretrained":
        model = load("me/base", revision="v2", quantization_config=glowq.GlowQConfig(base="nf4", **options))
        stored = model.config.quantization_config
    else:
        model = quantized("me/base", "nf4", revision="v2")
        tokenizer = AutoTokenizer.from_pretrained("me/base", revision="v2")
        found = glowq.correct(model, reference="me/base@v2", revision="v2", tokenizer=tokenizer, **options)
        found.save_pretrained(tmp_path / "correction")
        assert gap(load(tmp_path / "correction"), logits(model)) == 0.0
        stored = found.config
    assert (stored.base_model["name"], stored.base_model["revision"]) == ("me/base", OTHER_COMMIT)
    model.save_pretrained(tmp_path / "full")
    assert gap(load(tmp_path / "full"), logits(model)) == 0.0


def test_another_revision_as_reference_is_refused_with_how_to_name_one(source: Path, tmp_path: Path, hub: Any) -> None:
    hub("me/base", tiny_llama(tmp_path / "main", seed=5))
    hub("me/base", source, "v2", OTHER_COMMIT)
    options: dict[str, Any] = {"calibration": TEXTS, "rank": 4, **CALIBRATION}
    tokenizer = AutoTokenizer.from_pretrained(source)
    with pytest.raises(ReferenceMismatchError, match=r"reference='org/model@revision'"):
        glowq.correct(quantized(source, "nf4"), reference="me/base", tokenizer=tokenizer, **options)
    assert glowq.correct(quantized(source, "nf4"), reference="me/base@v2", tokenizer=tokenizer, **options).factors


def test_two_revisions_at_once(saved: Any, hub: Any) -> None:
    hub("me/correction", saved[2] / "correction")
    assert glowq.Correction.from_pretrained("me/correction@main", revision="main").ranks == saved[1].ranks
    with pytest.raises(ConfigError, match="me/correction@main names another revision than revision='v2'"):
        glowq.Correction.from_pretrained("me/correction@main", revision="v2")


def test_a_hub_repository_may_not_name_a_folder_of_this_machine(saved: Any, hub: Any) -> None:
    hub("me/correction", saved[2] / "correction")
    with pytest.raises(UnsafePathError, match=r"names the local folder .* as its base; refused"):
        load("me/correction")


@pytest.mark.parametrize("name", ["tiny", "./tiny", "org/tiny", "a/b/tiny", "~/tiny"])
def test_nor_a_folder_of_the_working_directory(
    saved: Any, source: Path, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Neither by the name of the repository, nor by its folder in the cache."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    shutil.copytree(source, name)
    named = changed(saved[2] / "correction", tmp_path / "named", lambda c: c["base_model"].update(name=name))
    hub("me/correction", named)
    snapshot = tmp_path / "hub" / "models--me--correction" / "snapshots" / COMMIT
    for asked in ("me/correction", snapshot):
        with pytest.raises(UnsafePathError, match=f"names the local folder '{name}' as its base; refused"):
            load(asked)
    assert load(named).config.quantization_config.base_model["name"] == name  # a folder of the user may
