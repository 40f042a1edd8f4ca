"""torchao's tensor classes: glowq reads each supported class correctly and refuses the others by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from glowq.artifact.fingerprint import fingerprint
from glowq.cli.app import app
from glowq.errors import BackendError
from glowq.quantizers.base import Scheme
from glowq.quantizers.model import packed_bytes, prepare_model, read_weight
from glowq.quantizers.registry import find_backend
from support.tiny import correct, gap, load, logits, tiny_llama

torchao = pytest.importorskip("torchao.quantization")


def float8(**options: Any) -> nn.Linear:
    """Return a layer with 128 inputs and 32 outputs whose weight torchao stores in float8."""
    model = nn.Sequential(nn.Linear(128, 32, bias=False))
    torchao.quantize_(model, torchao.Float8WeightOnlyConfig(**options))
    return model[0]  # type: ignore[return-value]


def int4(zero_point: float = 0.25, **options: Any) -> nn.Linear:
    """Return a layer of 64 inputs and 32 outputs in groups of 32, in torchao's layout for GPUs: two codes per byte."""
    codes = torch.arange(-1024, 1024).reshape(32, 64) % 16 - 8
    packed = (codes[:, 1::2] << 4 | codes[:, ::2] & 15).to(torch.int8)
    scale = (torch.arange(64).reshape(2, 32) + 1).to(torch.bfloat16) / 64
    options = {"block_size": [1, 32], "shape": (32, 64), **options}
    linear = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    weight = torchao.Int4Tensor(packed, scale, torch.full_like(scale, zero_point), **options)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def read(module: nn.Module) -> Tensor:
    return read_weight(find_backend(module), "layer", module)


def test_float8_is_called_float8() -> None:
    from torchao.quantization.granularity import PerTensor

    module, whole = float8(), float8(granularity=PerTensor())
    backend = find_backend(module)
    assert backend.scheme(module) == Scheme("float8_e4m3fn", 8, None)
    assert backend.packed_bytes(module) == 32 * 128 + 32 * 4
    assert str(backend.scheme(whole)) == "float8_e4m3fn, one scale a row, shared by all rows"
    assert backend.packed_bytes(whole) == 32 * 128 + 4
    for layer in (module, whole):
        assert torch.equal(read(layer), layer.weight.dequantize())
        (codes,) = backend.codes(layer)
        assert codes.dtype == torch.uint8
        assert fingerprint(nn.Sequential(layer)).startswith("weights-sha256:")


def test_a_float8_model_is_corrected_saved_and_loaded(tmp_path: Path) -> None:
    from transformers import TorchAoConfig

    source = tiny_llama(tmp_path / "source")
    base = TorchAoConfig(torchao.Float8WeightOnlyConfig())
    model = load(source, quantization_config=base)
    correct(model, source)
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    assert gap(load(tmp_path / "saved"), expected) == 0

    load(source, quantization_config=base).save_pretrained(tmp_path / "quantized")
    listed = CliRunner().invoke(app, ["inspect", str(tmp_path / "quantized")])
    assert listed.exit_code == 0, listed.output
    assert "float8_e4m3fn" in listed.output
    assert "int8" not in listed.output


def test_int4_is_read_two_codes_a_byte() -> None:
    from torchao.prototype.gptq.api import _int4_row_dequantize_zp as dequantize

    module = int4()
    backend = find_backend(module)
    assert backend.scheme(module) == Scheme("int4", 4, 32, ("asymmetric",))
    assert backend.packed_bytes(module) == 32 * 64 // 2 + 2 * 2 * 32 * 2
    codes = torch.arange(-1024, 1024).reshape(32, 64) % 16 - 8
    weight: Any = module.weight
    expected = dequantize(codes, weight.scale.float(), weight.zero_point.float(), 32)
    assert torch.equal(read(module), expected)
    assert fingerprint(nn.Sequential(module)).startswith("weights-sha256:")
    assert not backend.rounds_inputs(module)


def test_int4_whose_inputs_become_float8() -> None:
    module = int4(0.0, activation_dtype=torch.float8_e4m3fn)
    backend = find_backend(module)
    assert backend.scheme(module) == Scheme("int4", 4, 32, ("symmetric",))
    assert backend.packed_bytes(module) == 32 * 64 // 2 + 2 * 32 * 2
    assert backend.rounds_inputs(module)


def test_scaled_inputs_are_refused() -> None:
    module = int4(act_pre_scale=torch.ones(64, dtype=torch.bfloat16))
    with pytest.raises(BackendError, match=r"layer: .*Int4Tensor multiplies its inputs by act_pre_scale"):
        read(module)


@pytest.mark.parametrize("method", ["weight", "codes", "scales", "scheme", "packed_bytes"])
def test_an_unknown_class_is_refused_by_name(method: str) -> None:
    module = other()
    with pytest.raises(BackendError, match=r"Int4PlainInt32Tensor cannot be read; supported: Int8Tensor, .*"):
        getattr(find_backend(module), method)(module)


def test_an_unknown_class_is_refused_when_the_model_is_loaded() -> None:
    with pytest.raises(BackendError, match="0: torchao's Int4PlainInt32Tensor cannot be read"):
        prepare_model(nn.Sequential(other()))


def other() -> nn.Linear:
    """Return a layer whose `qdata` has a layout that only NPUs and XPUs support."""
    linear = nn.Linear(64, 32, bias=False)
    weight = torchao.Int4PlainInt32Tensor(
        torch.zeros(32, 8, dtype=torch.int32),
        torch.ones(1, 32),
        torch.zeros(1, 32, dtype=torch.int8),
        [1, 64],
        (32, 64),
    )
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def test_int8_models_are_still_int8() -> None:
    model = nn.Sequential(nn.Linear(128, 32, bias=False))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    backend = find_backend(model[0])
    assert backend.scheme(model[0]) == Scheme("int8", 8, None, ("symmetric",))
    assert packed_bytes(model) == 32 * 128 + 32 * 4
