"""Modules of every base quantizer: glowq reads the same weights, codes and settings as their library."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glowq.errors import BackendError, NonFiniteError, RepackedWeightError, UnknownBaseError
from glowq.quantizers.base import Scheme
from glowq.quantizers.model import prepare_model, quantized_modules, read_weight
from glowq.quantizers.registry import backend_of, base_config, base_names, find_backend, with_calibration
from support.bases import BASES, BLOCKS, Base, repacks, rows

BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
Loaded = tuple[Base, Any]
SETTINGS: dict[str, str] = {}  # row -> settings of its first module


@pytest.fixture(scope="module", params=rows())
def loaded(request: pytest.FixtureRequest) -> Loaded:
    """One row and its prepared model. Tests must not change the model."""
    model = request.param.load()
    prepare_model(model)
    SETTINGS[request.param.name] = settings_of(model)
    return request.param, model


def settings_of(model: nn.Module) -> str:
    module = model.get_submodule("model.layers.0.self_attn.q_proj")
    backend = find_backend(module)
    return f"{backend.name} {backend.scheme(module)}"


def one_of_each_shape(model: nn.Module) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in quantized_modules(model) if ".layers.1." in name}


def test_every_preset_is_in_the_matrix() -> None:
    assert set(base_names()) == {base.name for base in BASES if base.is_preset}


@pytest.mark.parametrize("base", [row for row in rows() if row.values[0].is_preset])
def test_a_config_that_needs_no_text_is_left_as_it_is(base: Base) -> None:
    config = base_config(base.name)
    backend = backend_of(config)
    assert backend is not None
    if backend.calibrated(config):
        assert with_calibration(config, torch.ones(1, 4, dtype=torch.int64)) is not config
        config.dataset = ["text of one's own"]
    assert backend.with_calibration(config, torch.ones(1, 4, dtype=torch.int64)) is config
    assert with_calibration(config, torch.ones(1, 4, dtype=torch.int64)) is config


def test_all_linear_layers_of_the_blocks_are_found_and_the_head_is_not(loaded: Loaded) -> None:
    _, model = loaded
    found = quantized_modules(model)
    assert len(found) == BLOCKS * 7
    assert "lm_head" not in found
    backend = found["model.layers.0.self_attn.k_proj"]
    assert backend.features(model.get_submodule("model.layers.0.self_attn.k_proj")) == (128, 256)


def test_read_back_is_the_librarys_own_dequantize_bit_for_bit(loaded: Loaded) -> None:
    base, model = loaded
    for name, module in one_of_each_shape(model).items():
        backend = find_backend(module)
        assert backend is not None
        weight = read_weight(backend, name, module)
        assert weight.dtype == torch.float32
        assert weight.shape == backend.features(module)
        assert torch.equal(weight, base.dequantize(module).float())


def test_the_kernel_multiplies_by_the_weight_read(loaded: Loaded, token_ids: Tensor) -> None:
    base, model = loaded
    weights = {name: read_weight(find_backend(m), name, m) for name, m in one_of_each_shape(model).items()}
    with torch.no_grad():
        model(token_ids[:1, :8])  # compressed-tensors' modules can run only after a forward of the model
    for name, weight in weights.items():
        module = model.get_submodule(name)
        with torch.no_grad():
            seen = module(torch.eye(weight.shape[1])).float().T
        assert float((seen - weight).abs().max() / weight.abs().max()) <= base.kernel_error


def test_forwards_leave_the_weight_and_its_codes_as_they_were(loaded: Loaded, token_ids: Tensor) -> None:
    base, model = loaded
    name = "model.layers.1.mlp.down_proj"
    module = model.get_submodule(name)
    backend = find_backend(module)
    before, codes = read_weight(backend, name, module), [stored.clone() for stored in backend.codes(module)]
    for _ in range(2):
        with torch.no_grad():
            model(token_ids[:1, :8])
    assert torch.equal(read_weight(backend, name, module), before)
    assert torch.equal(before, base.dequantize(module).float())
    assert all(torch.equal(now, then) for now, then in zip(backend.codes(module), codes, strict=True))


def test_codes_are_whole_numbers_that_hold_the_weight(loaded: Loaded) -> None:
    _, model = loaded
    first, second = (model.get_submodule(f"model.layers.{i}.mlp.up_proj") for i in (0, 1))
    codes = [find_backend(module).codes(module) for module in (first, second)]
    assert all(not stored.is_floating_point() and type(stored) is Tensor for pair in codes for stored in pair)
    assert not torch.equal(codes[0][0], codes[1][0])


def test_packed_bytes_are_the_nominal_bits_and_at_most_one_more(loaded: Loaded) -> None:
    base, model = loaded
    for module in one_of_each_shape(model).values():
        backend = find_backend(module)
        outputs, inputs = backend.features(module)
        assert base.bits <= backend.packed_bytes(module) * 8 / (outputs * inputs) <= base.bits + 1


def test_damaged_scales_are_refused_by_name(loaded: Loaded) -> None:
    _, model = loaded
    name = "model.layers.0.self_attn.q_proj"
    module = model.get_submodule(name)
    backend = find_backend(module)
    scales = backend.scales(module)[-1].view(-1)
    good = scales[:1].clone()
    # The change is made in place and undone, because quanto's modules cannot be copied. Only inference mode allows
    # changes of gptqmodel's scales.
    with torch.inference_mode():
        scales[0] = float("nan")
    try:
        with pytest.raises(NonFiniteError, match=r"model\.layers\.0\.self_attn\.q_proj: .*scales hold NaN or Inf"):
            read_weight(backend, name, module)
    finally:
        with torch.inference_mode():
            scales[:1] = good


def test_the_settings_of_every_row_read_differently() -> None:
    installed = [base for base in BASES if base.installed]
    schemes = {base.name: SETTINGS.get(base.name) or settings_of(base.load()) for base in installed}
    assert len(set(schemes.values())) == len(schemes), schemes


@pytest.mark.parametrize("base", rows("torchao-int8"))
def test_a_symmetric_scheme_is_called_symmetric(base: Base) -> None:
    module = base.load().get_submodule("model.layers.0.self_attn.q_proj")
    assert find_backend(module).scheme(module) == Scheme("int8", 8, None, ("symmetric",))


@pytest.mark.skipif(not repacks(), reason="bitsandbytes repacks on AVX512-BF16 CPUs only")
@pytest.mark.parametrize("base", rows("nf4", "fp4-double"))
def test_a_weight_that_ran_before_it_was_prepared_is_refused(base: Base, token_ids: Tensor) -> None:
    model = base.load(dtype=torch.bfloat16)
    with torch.no_grad():
        model(token_ids[:1, :4])
    name, backend = next(iter(prepare_model(model).items()))
    module = model.get_submodule(name)
    with pytest.raises(RepackedWeightError, match="before its first forward"):
        read_weight(backend, name, module)
    with pytest.raises(RepackedWeightError):
        backend.codes(module)


@pytest.mark.parametrize("base", rows("nf4"))
def test_a_prepared_bfloat16_model_keeps_its_weight(base: Base, token_ids: Tensor) -> None:
    model = base.load(dtype=torch.bfloat16)
    name = "model.layers.1.mlp.gate_proj"
    module = model.get_submodule(name)
    expected = base.dequantize(module).float()
    backend = prepare_model(model)[name]
    with torch.no_grad():
        model(token_ids[:1, :4])
    assert torch.equal(read_weight(backend, name, module), expected)


@pytest.mark.skipif(not BITSANDBYTES, reason="needs bitsandbytes")
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_a_module_that_was_never_quantized_is_refused(kind: str) -> None:
    import bitsandbytes

    options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
    module = getattr(bitsandbytes.nn, kind)(64, 64, **options)
    with pytest.raises(BackendError, match="never quantized"):
        read_weight(find_backend(module), "layer", module)


def test_a_plain_linear_belongs_to_no_backend() -> None:
    module = nn.Linear(4, 3)
    assert find_backend(module) is None
    assert quantized_modules(nn.Sequential(module)) == {}


@pytest.mark.parametrize(("name", "near"), [("nf5", "nf4"), ("torchao-int5", "torchao-int4"), ("in8", "int8")])
def test_an_unknown_name_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UnknownBaseError, match=f"unknown base quantizer '{name}'.* Did you mean '"):
        base_config(name)
    with pytest.raises(UnknownBaseError, match=near):
        base_config(name)


def test_a_name_like_no_other_gets_the_list_alone() -> None:
    with pytest.raises(UnknownBaseError, match=r"expected one of .*nf4.*torchao-int8\.$"):
        base_config("???")


@pytest.mark.parametrize("base", [base for base in BASES if base.is_preset], ids=lambda base: base.name)
def test_an_absent_library_is_named_with_its_extra(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == base.package else real(name, *rest)
    )
    with pytest.raises(UnknownBaseError, match=rf"needs {base.package}.*pip install 'glowq\[{base.extra}\]'"):
        base_config(base.name)
