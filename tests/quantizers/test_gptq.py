"""GPTQ models: quantized while loading, written by several libraries, and damaged in several ways."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as modes
from transformers import AutoTokenizer, GPTQConfig

import glowq
from glowq.errors import BackendError, ConfigError, FingerprintError, NonFiniteError, RepackedWeightError
from glowq.models.loading import load_config, load_model
from glowq.quantizers.base import Scheme
from glowq.quantizers.model import prepare_model, quantized_modules, read_weight
from glowq.quantizers.registry import base_config, find_backend, with_calibration
from glowq.utils.processor import forced
from support import writers
from support.bases import BASES, Base, small_model
from support.cli import result_of
from support.tiny import CALIBRATION, CHEAP, IDS, TEXTS, gap, load, logits, tiny_llama

pytest.importorskip("gptqmodel")

pytestmark = pytest.mark.usefixtures("uncompiled")

NAME = "model.layers.0.self_attn.q_proj"
ROWS = {base.name: base for base in BASES}


@cache
def act_order() -> Path:
    return ROWS["gptqmodel-int4-act-order"].checkpoint(small_model())


@pytest.fixture(scope="module")
def groups_of_128(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a symmetric 4-bit checkpoint written by optimum."""
    folder = tmp_path_factory.mktemp("optimum") / "model"
    writers.optimum(small_model(), folder, bits=4, group_size=128)
    return folder


def correct(model: Any, **options: Any) -> glowq.Correction:
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    text = {"reference": small_model(), "calibration": TEXTS, "tokenizer": tokenizer, **CALIBRATION}
    return glowq.correct(model, **{**text, "rank": 4, **CHEAP, **options})


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[str, Callable[[Tensor], Tensor]], Path]:
    """A function that copies the act-order checkpoint and changes one tensor of one module."""

    def build(tensor: str, change: Callable[[Tensor], Tensor]) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(act_order(), folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[f"{NAME}.{tensor}"] = change(tensors[f"{NAME}.{tensor}"].clone()).contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return build


def test_zero_points_less_one_are_the_same_weight(tmp_path: Path) -> None:
    writers.optimum(small_model(), tmp_path, bits=4, group_size=64, sym=False)
    new, old = load(tmp_path), ROWS["auto-gptq-int4"].load(dtype=torch.bfloat16)
    prepare_model(new)
    for name, backend in prepare_model(old).items():
        weights = [read_weight(backend, name, model.get_submodule(name)) for model in (new, old)]
        assert torch.equal(*weights), name


def test_a_width_that_is_no_multiple_of_the_group(tmp_path: Path) -> None:
    """The last group is smaller. It was taken for another group size, in another order of the columns."""
    wide = tiny_llama(tmp_path / "wide", hidden_size=192, num_hidden_layers=1)
    writers.optimum(wide, tmp_path / "gptq", bits=4, group_size=128)
    model = load(tmp_path / "gptq")
    backend = prepare_model(model)[NAME]
    scheme = backend.scheme(model.get_submodule(NAME))
    assert (scheme.group_size, scheme.details) == (128, ("symmetric",))
    found = result_of("inspect", tmp_path / "gptq")
    assert str(scheme) in json.dumps(found)
    assert "groups of 96" not in json.dumps(found)


@pytest.mark.parametrize("door", ["correct", "compare"])
def test_the_base_is_calibrated_in_the_dtype_that_is_fast_here(
    door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor without products of bfloat16, GPTQ took four times as long as in float32."""
    from optimum.gptq import GPTQQuantizer

    folder = tiny_llama(tmp_path, num_hidden_layers=1)
    config = base_config("gptq-4")
    quantize, found = GPTQQuantizer.quantize_model, []

    def spied(self: Any, model: Any, *args: Any) -> Any:
        found.append([type(mode).__name__ for mode in modes()])
        return quantize(self, model, *args)

    monkeypatch.setattr(GPTQQuantizer, "quantize_model", spied)
    with forced(True):
        if door == "correct":
            request = glowq.GlowQConfig(base=config, calibration=TEXTS, rank=1, **CALIBRATION, **CHEAP)
            load(folder, quantization_config=request, dtype=torch.bfloat16)
        else:
            load_model(str(folder), load_config(str(folder)), with_calibration(config, IDS))
    assert found == [["_Float32Products"]]


def test_the_weight_read_is_the_nearest_code_of_the_weight_quantized() -> None:
    reference, model = load(small_model()), ROWS["gptqmodel-int8-rows"].load(dtype=torch.bfloat16)
    for name, backend in prepare_model(model).items():
        read = read_weight(backend, name, model.get_submodule(name))
        full = reference.get_submodule(name).weight.float()
        step = model.get_submodule(name).scales.float().T
        assert float(((read - full).abs() / step).median()) < 0.6, name  # GPTQ moves codes by one or two steps


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("gptq-4", Scheme("gptq int4", 4, 128, ("symmetric",))),
        ("gptq-2", Scheme("gptq int2", 2, 128, ("asymmetric",))),
        ("gptqmodel-int4-act-order", Scheme("gptq int4", 4, 32, ("symmetric", "act-order"))),
        ("gptqmodel-int8-rows", Scheme("gptq int8", 8, None, ("asymmetric",))),
        ("optimum-int3-act-order", Scheme("gptq int3", 3, 64, ("asymmetric", "act-order"))),
    ],
)
def test_the_scheme_is_what_was_asked_for(row: str, expected: Scheme) -> None:
    module = ROWS[row].load().get_submodule(NAME)
    assert find_backend(module).scheme(module) == expected


def test_symmetric_three_bits_are_called_symmetric() -> None:
    module = ROWS["gptq-3"].load().get_submodule(NAME)
    assert find_backend(module).scheme(module) == Scheme("gptq int3", 3, 128, ("symmetric",))


def test_quantized_and_corrected_while_loading_it_is_saved_in_one_piece_without_the_text(tmp_path: Path) -> None:
    config = glowq.GlowQConfig(base="gptq-4", rank=4, calibration=TEXTS, force=True, **CALIBRATION)
    model = load(small_model(), quantization_config=config)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert gap(load(tmp_path), expected) == 0.0
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["base"]["quant_method"] == "gptq"
    assert stored["base"]["dataset"] is None
    assert "area(width" not in (tmp_path / "config.json").read_text()


def test_a_correction_cannot_be_attached_to_weights_that_text_would_have_to_quantize(tmp_path: Path) -> None:
    config = glowq.GlowQConfig(base="gptq-4", correction=str(tmp_path))
    with pytest.raises(ConfigError, match="needs text to quantize"):
        load(small_model(), quantization_config=config)


def test_a_model_quantized_by_the_user_knows_that_it_is_stored_nowhere(tmp_path: Path) -> None:
    config = GPTQConfig(bits=4, group_size=64, dataset=TEXTS, tokenizer=str(small_model()), backend="torch")
    correction = correct(load(small_model(), quantization_config=config))
    with pytest.raises(ConfigError, match=r"stored nowhere.*save the quantized model first"):
        correction.save_pretrained(tmp_path / "corr")
    assert not (tmp_path / "corr").exists()


def test_the_same_command_quantizes_to_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        config = glowq.GlowQConfig(base="gptq-3", rank=2, calibration=TEXTS, **CALIBRATION)
        load(small_model(), quantization_config=config).save_pretrained(tmp_path / name)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert (tmp_path / "one/config.json").read_bytes() == (tmp_path / "two/config.json").read_bytes()


def test_a_kernel_that_rewrote_its_weight_is_refused() -> None:
    model = load(act_order())
    before = type(model.get_submodule(NAME)).__name__
    logits(model)
    with pytest.raises(RepackedWeightError, match=rf"{before} rewrote its weight.*before its first forward"):
        correct(model)


def test_prepared_in_time_the_same_kernel_keeps_its_weight() -> None:
    model = load(act_order())
    backend = prepare_model(model)[NAME]
    before = read_weight(backend, NAME, model.get_submodule(NAME))
    logits(model)
    assert torch.equal(read_weight(backend, NAME, model.get_submodule(NAME)), before)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (0.0, BackendError, r"1 of its \d+ quantization scales are zero, which gptq never writes"),
        (float("inf"), NonFiniteError, "its quantization scales hold NaN or Inf"),
        (float("nan"), NonFiniteError, "its quantization scales hold NaN or Inf"),
    ],
)
def test_damaged_scales_are_refused(damaged: Any, value: float, error: type[Exception], words: str) -> None:
    def change(scales: Tensor) -> Tensor:
        scales.view(-1)[5] = value
        return scales

    with pytest.raises(error, match=rf"model\.layers\.0\.self_attn\.q_proj: {words}"):
        correct(load(damaged("scales", change)))


def test_a_column_order_outside_of_the_groups_is_refused(damaged: Any) -> None:
    model = load(damaged("g_idx", lambda order: order + 1))
    with pytest.raises(BackendError, match=r"q_proj: g_idx names groups 1 to 8, but there are 8"):
        correct(model)


def test_a_permuted_column_order_is_other_weights(damaged: Any, tmp_path: Path) -> None:
    correct(load(act_order())).save_pretrained(tmp_path / "corr")
    model = load(damaged("g_idx", lambda order: order.flip(0)))
    with pytest.raises(FingerprintError, match="was made for quantized weights"):
        glowq.load_correction(model, tmp_path / "corr")


@pytest.mark.parametrize("settings", [{"group_size": 64}, {"group_size": 128, "desc_act": True}, {"sym": False}])
def test_a_base_quantized_with_other_settings_is_other_weights(
    settings: dict[str, Any], groups_of_128: Path, tmp_path: Path
) -> None:
    writers.optimum(small_model(), tmp_path / "other", **{"bits": 4, "group_size": 128, **settings})
    correct(load(groups_of_128)).save_pretrained(tmp_path / "corr")
    with pytest.raises(FingerprintError, match="other quantization settings"):
        glowq.load_correction(load(tmp_path / "other"), tmp_path / "corr")


def test_the_files_that_saving_needs_must_still_be_there(tmp_path: Path) -> None:
    shutil.copytree(act_order(), tmp_path / "base")
    model = load(tmp_path / "base")
    correct(model)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ConfigError, match="whose files are needed to save it"):
        model.save_pretrained(tmp_path / "full")


@pytest.mark.parametrize("base", [ROWS["gptq-4"], ROWS["optimum-int3-act-order"]], ids=lambda base: base.name)
def test_a_dequantized_model_says_the_same(base: Base) -> None:
    model = base.load()
    correct(model)
    expected = logits(model)
    dense = model.dequantize()
    assert quantized_modules(dense) == {}
    assert gap(dense, expected) < 1e-3 * float(expected.abs().max())
