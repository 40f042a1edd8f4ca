"""HQQ: models that its library quantizes while loading, and all kinds of its layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import HqqConfig
from transformers.quantizers.auto import AutoHfQuantizer

import glowq
from glowq.errors import BackendError, ConfigError
from glowq.quantizers.base import Scheme
from glowq.quantizers.model import quantized_modules, read_weight
from glowq.quantizers.registry import find_backend
from glowq.runtime.attach import attached_factors
from support import writers
from support.tiny import CALIBRATION, CHEAP, TEXTS, biased_llama, correct, gap, load, logits

pytest.importorskip("hqq")

from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def request(base: Any = "hqq-4", **options: Any) -> glowq.GlowQConfig:
    return glowq.GlowQConfig(**{"base": base, "rank": 4, "calibration": TEXTS, **CALIBRATION, **options})


def quantize(source: Path, base: Any = "hqq-4", **options: Any) -> Any:
    """Load a model that is quantized while loading, without a correction."""
    few = {"rank": 1, "calibration_tokens": 128}  # a small correction, because it is detached at once
    model = load(source, quantization_config=request(base, **few), **options)
    glowq.detach(model)
    return model


def layer(shape: tuple[int, int] = (128, 24), **settings: Any) -> Any:
    """Return one layer that HQQ quantized."""
    with torch.no_grad():
        return HQQLinear(
            nn.Linear(*shape),
            BaseQuantizeConfig(**{"nbits": 4, "group_size": 64, **settings}),
            compute_dtype=torch.float32,
            device="cpu",
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantized_while_loading_is_what_hqq_makes(bits: int, dtype: torch.dtype, source: Path) -> None:
    ours, hqq_model = (
        quantize(source, f"hqq-{bits}", dtype=dtype),
        writers.quantize_with_hqq(source, dtype, nbits=bits, group_size=64),
    )
    assert list(quantized_modules(ours)) == list(quantized_modules(hqq_model))
    for name in quantized_modules(hqq_model):
        made, expected = ours.get_submodule(name), hqq_model.get_submodule(name)
        assert made.compute_dtype == dtype
        assert torch.equal(made.W_q, expected.W_q)
        assert torch.equal(made.dequantize(), expected.dequantize())
        assert torch.equal(made.meta["zero"], expected.meta["zero"])
    if dtype == torch.float32:  # in others HQQ also rounds the rotary frequencies, which should stay exact
        assert gap(ours, logits(hqq_model)) == 0.0


def test_the_model_computes_with_the_weights_that_hqq_dequantizes(source: Path) -> None:
    model, dense = quantize(source, dtype=torch.float32), load(source, dtype=torch.float32)
    for name in quantized_modules(model):
        dense.get_submodule(name).weight.data = model.get_submodule(name).dequantize()
    assert gap(dense, logits(model)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_saved_by_reference_and_quantized_again_is_the_same_model(
    bits: int, dtype: torch.dtype, source: Path, tmp_path: Path
) -> None:
    model = load(source, quantization_config=request(f"hqq-{bits}", **CHEAP), dtype=dtype)
    expected = logits(model)
    with glowq.disabled(model):
        assert gap(model, expected) > 0.0
    fresh = quantize(source, f"hqq-{bits}", dtype=dtype)
    correct(fresh, source, **CHEAP).save_pretrained(tmp_path)
    assert gap(fresh, expected) == 0.0
    loaded = load(tmp_path)
    assert loaded.dtype == dtype
    assert gap(loaded, expected) == 0.0


def test_the_number_of_threads_changes_no_code() -> None:
    """HQQ stops early by a mean over the weight, whose sum order may depend on the threads.

    A correction is valid only for the codes that it was made for, so they must not change.
    """
    linear, threads, made = nn.Linear(1024, 1536, bias=False), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            config = BaseQuantizeConfig(nbits=3, group_size=64)
            made.append(HQQLinear(copy.deepcopy(linear), config, compute_dtype=torch.float32, device="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(made[0].W_q, other.W_q) for other in made)
    assert all(torch.equal(made[0].meta["zero"], other.meta["zero"]) for other in made)


def test_one_piece_is_refused_with_what_to_do_instead(source: Path, tmp_path: Path) -> None:
    model = load(source, quantization_config=request())
    with pytest.raises(ConfigError, match=r"hqq model cannot be saved in one piece.*Correction\.save_pretrained"):
        model.save_pretrained(tmp_path / "full")


def test_groups_detach_and_dequantize(source: Path) -> None:
    model = load(source, quantization_config=request())
    members = [entry.group.members for entry in attached_factors(model)]
    assert [len(group) for group in members] == [3, 1, 2, 1] * 2
    expected = logits(model)
    glowq.detach(model)
    assert gap(model, logits(quantize(source))) == 0.0
    again = load(source, quantization_config=request(), dtype=torch.float32)
    expected = logits(again)
    assert type(again.dequantize().model.layers[0].mlp.up_proj) is nn.Linear
    assert gap(again, expected) < 1e-5


def test_biases_are_kept_and_the_model_can_be_copied(tmp_path: Path) -> None:
    folder = biased_llama(tmp_path / "biased")
    model = load(folder, quantization_config=request("hqq-8"))
    expected = logits(model)
    with glowq.disabled(model):
        assert gap(model, logits(load(folder))) < 0.05
    assert gap(copy.deepcopy(model), expected) == 0.0
    correct(quantize(folder, "hqq-8"), folder).save_pretrained(tmp_path / "corr")
    assert gap(load(tmp_path / "corr"), expected) == 0.0


def test_settings_by_layer(source: Path) -> None:
    two = {"nbits": 2, "group_size": 32, "axis": 1}
    model = quantize(source, HqqConfig(dynamic_config={"mlp.up_proj": two, "self_attn.q_proj": {**two, "axis": 0}}))
    found = {name: str(backend.scheme(model.get_submodule(name))) for name, backend in quantized_modules(model).items()}
    assert found == {
        f"model.layers.{i}.{tag}": f"hqq2, groups of 32{note}"
        for i in (0, 1)
        for tag, note in (("self_attn.q_proj", ", groups across rows"), ("mlp.up_proj", ""))
    }


def test_modules_to_skip(source: Path) -> None:
    model = quantize(
        source, HqqConfig(skip_modules=["lm_head", "o_proj", "mlp.up_proj", "model.layers.1.mlp.down_proj"])
    )
    plain = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    both = {f"model.layers.{i}.{tag}" for i in (0, 1) for tag in ("self_attn.o_proj", "mlp.up_proj")}
    assert plain == both | {"lm_head", "model.layers.1.mlp.down_proj"}


def test_a_config_that_names_no_layer(source: Path) -> None:
    config = HqqConfig(dynamic_config={"attention.q": {"nbits": 4, "group_size": 64}})
    with pytest.raises(BackendError, match=r"no linear layer that the HqqConfig names; .*self_attn\.q_proj"):
        quantize(source, config)


def test_groups_that_do_not_fit(source: Path) -> None:
    with pytest.raises(BackendError, match=r"q_proj has shape \(128, 128\), .*groups of 24; give a group_size"):
        quantize(source, HqqConfig(nbits=4, group_size=24))


@pytest.mark.parametrize("places", [{"": "disk"}, {"model": "cpu", "lm_head": 0}], ids=str)
def test_offloading_is_refused(places: Any, source: Path) -> None:
    quantizer = AutoHfQuantizer.from_config(HqqConfig(), pre_quantized=False)
    with pytest.raises(BackendError, match="cannot be offloaded"):
        quantizer.validate_environment(device_map=places)


def test_transformers_own_way_to_quantize_works_too(source: Path) -> None:
    model = load(source, quantization_config=HqqConfig(nbits=4, group_size=64))
    assert gap(model, logits(quantize(source))) == 0.0


def test_a_layer_without_a_weight_is_refused() -> None:
    module = HQQLinear(None, None, device="cpu")
    with pytest.raises(BackendError, match="holds no quantized weight"):
        read_weight(find_backend(module), "layer", module)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_every_precision_is_read_as_hqq_reads_it(bits: int, axis: int) -> None:
    module = layer(nbits=bits, axis=axis)
    backend = find_backend(module)
    assert torch.equal(read_weight(backend, "layer", module), module.dequantize())
    assert backend.scheme(module).bits == bits
    assert backend.packed_bytes(module) == 128 * 24 * (bits + 64 / 64) / 8
    with torch.no_grad():
        seen = module(torch.eye(128)).T - module.bias[:, None]
    assert float((seen - module.dequantize()).abs().max()) < 1e-6


def test_a_group_that_is_a_row_is_called_one() -> None:
    module = layer(group_size=None)
    assert find_backend(module).scheme(module) == Scheme("hqq4", 4, None)


def test_codes_stored_under_a_float_dtype_are_the_same_codes() -> None:
    linear = nn.Linear(128, 24)
    plain, viewed = (
        HQQLinear(
            copy.deepcopy(linear),
            BaseQuantizeConfig(nbits=4, group_size=64, view_as_float=view),
            compute_dtype=torch.float32,
            device="cpu",
        )
        for view in (False, True)
    )
    assert viewed.W_q.is_floating_point()
    backend = find_backend(viewed)
    assert torch.equal(backend.codes(viewed)[0].reshape(-1), backend.codes(plain)[0].reshape(-1))
    assert torch.equal(backend.weight(viewed), backend.weight(plain))


def test_quantized_scales_and_zero_points_of_older_files() -> None:
    settings, weight = BaseQuantizeConfig(nbits=4, group_size=16), torch.randn(256, 256)
    module = HQQLinear(None, settings, compute_dtype=torch.float32, device="cpu")
    module.quantize(
        weight,
        settings["weight_quant_params"],
        {"nbits": 8, "channel_wise": True, "group_size": 128, "optimize": False},
        {"nbits": 8, "channel_wise": False, "group_size": None, "optimize": False},
    )
    backend = find_backend(module)
    assert torch.equal(read_weight(backend, "layer", module), module.dequantize())
    assert backend.scheme(module) == Scheme("hqq4", 4, 16, ("quantized scales", "quantized zeros"))
    assert [stored.dtype for stored in backend.codes(module)] == [torch.uint8] * 3
    assert backend.packed_bytes(module) * 8 / weight.numel() < 5.1
    module.meta["meta_scale"]["scale"][0] = torch.inf
    with pytest.raises(glowq.errors.NonFiniteError, match="layer: its quantization scales"):
        read_weight(backend, "layer", module)
