"""optimum-quanto: all its precisions, its bfloat16 kernel, and unsupported cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import glowq
from glowq.errors import BackendError, ConfigError, FingerprintError, NonFiniteError, UntestedVersionWarning
from glowq.quantizers.base import Scheme
from glowq.quantizers.model import prepare_model, quantized_modules, read_weight
from glowq.quantizers.registry import find_backend
from glowq.utils.versions import warn_untested
from support.tiny import (
    CALIBRATION,
    CHEAP,
    TEXTS,
    biased_llama,
    correct,
    corrected,
    gap,
    load,
    logits,
    quantized,
    tiny_llama,
)

quanto = pytest.importorskip("optimum.quanto")

KINDS = ["int2", "int4", "int8", "float8"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama with rows longer than 128, so that quanto uses groups of 128."""
    return tiny_llama(tmp_path_factory.mktemp("source") / "llama", hidden_size=256)


def layer(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Return a layer of quanto with 256 inputs and 16 outputs."""
    linear = nn.Linear(256, 16, dtype=dtype)
    weights = {"int2": quanto.qint2, "int4": quanto.qint4, "int8": quanto.qint8, "float8": quanto.qfloat8}[kind]
    return quanto.QLinear.from_module(linear, weights=weights, **options)


def frozen(kind: str, dtype: torch.dtype = torch.float32, weight: Tensor | None = None) -> Any:
    module = layer(kind, dtype)
    with torch.no_grad():
        if weight is not None:
            module.weight.copy_(weight)
        module.freeze()
    return module


def read(module: Any) -> Tensor:
    return read_weight(find_backend(module), "layer", module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_by_reference_and_quantized_again_is_the_same_model(
    kind: str, dtype: torch.dtype, source: Path, tmp_path: Path
) -> None:
    config = glowq.GlowQConfig(base=f"quanto-{kind}", rank=4, calibration=TEXTS, **CHEAP, **CALIBRATION)
    model = load(source, quantization_config=config, dtype=dtype)
    after = quantized(source, f"quanto-{kind}", dtype=dtype)
    correction = correct(after, source, **CHEAP)
    correction.save_pretrained(tmp_path)
    expected = logits(model)
    assert gap(after, expected) == 0.0
    loaded = load(tmp_path)
    assert loaded.dtype == dtype
    assert gap(loaded, expected) == 0.0
    fresh = quantized(source, f"quanto-{kind}", dtype=dtype)
    assert gap(fresh, expected) > 0.0
    glowq.load_correction(fresh, tmp_path)
    assert gap(fresh, expected) == 0.0


def test_another_dtype_is_another_base(source: Path, tmp_path: Path) -> None:
    corrected(source, "quanto-int4")[1].save_pretrained(tmp_path)
    with pytest.raises(FingerprintError, match="quantized from another dtype"):
        glowq.load_correction(quantized(source, "quanto-int4", dtype=torch.float32), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_one_piece_is_refused_with_what_to_do_instead(kind: str, source: Path, tmp_path: Path) -> None:
    model, _ = corrected(source, f"quanto-{kind}")
    with pytest.raises(ConfigError, match=r"quanto model cannot be saved in one piece.*Correction\.save_pretrained"):
        model.save_pretrained(tmp_path / "full")


@pytest.mark.parametrize(
    ("kind", "scheme", "bits"),
    [
        ("int2", Scheme("qint2", 2, 128, ("asymmetric",)), 2 + 64 / 128),
        ("int4", Scheme("qint4", 4, 128, ("asymmetric",)), 4 + 64 / 128),
        ("int8", Scheme("qint8", 8, None, ("symmetric",)), 8 + 32 / 256),
        ("float8", Scheme("qfloat8_e4m3fn", 8, None, ("symmetric",)), 8 + 32 / 256),
    ],
)
def test_scheme_and_bytes(kind: str, scheme: Scheme, bits: float) -> None:
    module = frozen(kind)
    backend = find_backend(module)
    assert backend.scheme(module) == scheme
    assert backend.packed_bytes(module) == 256 * 16 * bits / 8


def test_short_rows_have_one_scale_each(tmp_path: Path) -> None:
    model = quantized(tiny_llama(tmp_path, hidden_size=128), "quanto-int4")
    module = model.model.layers[0].self_attn.q_proj
    assert find_backend(module).scheme(module).group_size is None
    assert find_backend(module).scales(module)[0].numel() == 128


def test_the_bfloat16_kernel_multiplies_by_the_weight_read_and_not_by_quantos() -> None:
    module = frozen("int4", torch.bfloat16)
    assert type(module.weight).__name__ == "TinyGemmWeightQBitsTensor"
    weight, quanto_weight = read(module), module.weight.dequantize().detach().float()
    module.bias = None
    x = torch.randn(512, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        seen = module(torch.eye(256, dtype=torch.bfloat16)).T
        output = module(x).double()
    assert torch.equal(seen, weight.bfloat16())

    def relative_error(candidate: Tensor) -> float:
        return float((output - x.double() @ candidate.double().T).norm() / output.norm())

    assert relative_error(weight) < 2**-9 < 2 * relative_error(weight) < relative_error(quanto_weight)


@pytest.mark.parametrize("kind", ["int2", "int4"])
def test_codes_and_scales_are_those_of_the_packing_that_every_device_has(kind: str) -> None:
    weight = torch.randn(16, 256, dtype=torch.bfloat16)
    module = frozen(kind, torch.bfloat16, weight)
    scale, shift = quanto.MaxOptimizer()(weight, module.weight_qtype, 0, 128)
    plain = quanto.WeightQBitsTensor.quantize(weight, module.weight_qtype, 0, 128, scale, shift, optimized=False)
    backend = find_backend(module)
    assert torch.equal(backend.codes(module)[0], plain._data._data)
    assert torch.equal(backend.scales(module)[0], plain._scale)


@pytest.mark.parametrize("kind", ["int2", "int4", "int8"])
def test_a_row_of_zeros_stays_one(kind: str) -> None:
    weight = torch.randn(16, 256)
    weight[3] = 0.0
    module = frozen(kind, weight=weight)
    assert float(find_backend(module).scales(module)[0].min()) == 0.0
    assert torch.equal(read(module)[3], torch.zeros(256))


def test_a_row_of_zeros_that_quanto_makes_nan_of_is_refused() -> None:
    weight = torch.randn(16, 256)
    weight[3] = 0.0
    with pytest.raises(NonFiniteError, match="layer: the dequantized weight holds NaN"):
        read(frozen("float8", weight=weight))


def test_a_layer_that_is_not_frozen_is_refused() -> None:
    with pytest.raises(BackendError, match=r"call optimum\.quanto\.freeze\(model\)"):
        read(layer("int4"))


def test_quantized_activations_are_refused() -> None:
    module = layer("int8", activations=quanto.qint8)
    module.freeze()
    with pytest.raises(BackendError, match=r"activations to qint8.*activations=None"):
        read(module)


def test_a_model_that_quanto_itself_quantized(source: Path, tmp_path: Path) -> None:
    def model() -> Any:
        made = load(source, dtype=torch.float32)
        quanto.quantize(made, weights=quanto.qint4, exclude="lm_head")
        quanto.freeze(made)
        return made

    first, second = model(), model()
    assert len(quantized_modules(first)) == 14
    tokenizer = AutoTokenizer.from_pretrained(source)
    correction = glowq.correct(first, reference=source, calibration=TEXTS, tokenizer=tokenizer, rank=4, **CALIBRATION)
    correction.save_pretrained(tmp_path / "corr")
    glowq.load_correction(second, tmp_path / "corr")
    assert gap(second, logits(first)) == 0.0
    with pytest.raises(ConfigError, match=r"Load the base with the library .*glowq\.load_correction"):
        load(tmp_path / "corr")
    with pytest.raises(ConfigError, match="in one piece"):
        first.save_pretrained(tmp_path / "full")


def test_biases_are_kept(tmp_path: Path) -> None:
    folder = biased_llama(tmp_path / "biased")
    model, _ = corrected(folder, "quanto-int8")
    expected = logits(model)
    model.dequantize()
    assert float((logits(model) - expected).abs().max()) < 1e-4
    assert torch.equal(model.model.layers[0].mlp.up_proj.bias, load(folder).model.layers[0].mlp.up_proj.bias)


def test_another_version_of_quanto_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(frozen("int8"))
    monkeypatch.setattr(type(find_backend(module[0])), "tested", ">=9")
    warn_untested.cache_clear()
    with pytest.warns(UntestedVersionWarning, match=r"quanto 0\.2\.\d+ is outside .*>=9"):
        prepare_model(module)
    prepare_model(module)  # a warning of glowq is an error here
    warn_untested.cache_clear()
