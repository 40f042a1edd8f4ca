"""Other settings of a base's library: half the group size, the next bit width, and both widths in one model.

The oracle of every weight is the library itself, called on the full-precision weight of one module.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

from glowq.quantizers.base import Unavailable
from glowq.quantizers.model import quantized_modules, read_weight
from glowq.quantizers.registry import backend_of, base_config, base_names
from glowq.quantizers.settings import check_settings
from support.bases import rows, small_model
from support.cli import result_of
from support.tiny import biased_llama, gap, load, logits

WIDE = ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj", "layers.1.mlp.down_proj")
DENSE = ("lm_head",)

Oracle = Callable[[str, nn.Linear], Tensor]  # of the weight of one linear layer


def torchao(bits: int, group: int, symmetric: bool = True) -> Oracle:
    def quantize(name: str, linear: nn.Linear) -> Tensor:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
        from torchao.quantization.quant_primitives import MappingType

        mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
        dtype = getattr(torch, f"int{bits}")
        config: Any = IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerGroup(group), mapping_type=mapping)
        quantize_(linear, Int8WeightOnlyConfig() if bits == 8 else config)
        weight: Any = linear.weight
        return weight.dequantize()

    return quantize


def hqq(bits: int, group: int) -> Oracle:
    def quantize(name: str, linear: nn.Linear) -> Tensor:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        settings = BaseQuantizeConfig(nbits=bits, group_size=group)
        return HQQLinear(linear, settings, compute_dtype=linear.weight.dtype, device="cpu").dequantize()

    return quantize


def quanto(weights: str) -> Oracle:
    def quantize(name: str, linear: nn.Linear) -> Tensor:
        from optimum import quanto as library

        layer = library.QLinear.from_module(linear, weights=getattr(library, f"q{weights}"))
        layer.freeze()
        return layer.weight.dequantize()

    return quantize


def four_bits(kind: str) -> Oracle:
    def quantize(name: str, linear: nn.Linear) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        return dequantize_4bit(*quantize_4bit(linear.weight.data, blocksize=64, quant_type=kind))

    return quantize


def eight_bits(name: str, linear: nn.Linear) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    codes, scales, _ = int8_vectorwise_quant(linear.weight.data.half())
    return int8_vectorwise_dequant(codes, scales)


def full(name: str, linear: nn.Linear) -> Tensor:
    return linear.weight.data


def check_weights(model: nn.Module, oracle: Callable[[str], Oracle], folder: Path) -> None:
    """Assert that every linear layer of the blocks multiplies by what the oracle of its name makes of its weight."""
    reference, backends = load(folder, dtype=torch.float32), quantized_modules(model)
    names = [
        name for name, module in reference.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name
    ]
    assert names
    for name in names:
        module: Any = model.get_submodule(name)
        found = read_weight(backends[name], name, module) if name in backends else module.weight.float()
        wanted = oracle(name)(name, reference.get_submodule(name))
        assert torch.equal(found, wanted.detach().float()), name


def settings(base: str, method: str, wide: tuple[str, ...] = WIDE) -> Any:
    config = base_config(base)
    backend = backend_of(config)
    assert backend is not None
    if method != "mixed":
        return getattr(backend, method)(config)
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    kinds += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    names = [f"layers.{layer}.{kind}" for layer in range(2) for kind in kinds]
    return backend.mixed(config, wide, [name for name in names if name not in wide], DENSE)


WHOLE: list[tuple[str, str, Oracle]] = [
    ("torchao-int2", "finer", torchao(2, 32, symmetric=False)),
    ("torchao-int3", "finer", torchao(3, 32)),
    ("torchao-int2", "wider", torchao(3, 64)),
    ("torchao-int3", "wider", torchao(4, 64)),
    ("torchao-int4", "wider", torchao(8, 0)),
    ("hqq-3", "finer", hqq(3, 32)),
    ("hqq-2", "wider", hqq(3, 64)),
    ("hqq-3", "wider", hqq(4, 64)),
    ("hqq-4", "wider", hqq(8, 64)),
    ("quanto-int2", "wider", quanto("int4")),
    ("quanto-int4", "wider", quanto("int8")),
    ("nf4", "wider", eight_bits),
]
MIXED: list[tuple[str, Oracle, Oracle]] = [
    ("torchao-int2", torchao(2, 64, symmetric=False), torchao(3, 64)),
    ("torchao-int3", torchao(3, 64), torchao(4, 64)),
    ("torchao-int4", torchao(4, 64), torchao(8, 0)),
    ("hqq-2", hqq(2, 64), hqq(3, 64)),
    ("hqq-3", hqq(3, 64), hqq(4, 64)),
    ("quanto-int2", quanto("int2"), full),
    ("quanto-int4", quanto("int4"), full),
    ("nf4", four_bits("nf4"), full),
    ("fp4", four_bits("fp4"), full),
    ("int8", eight_bits, full),
]


def installed(base: str) -> None:
    (row,) = rows(base)
    if not row.values[0].installed:
        pytest.skip(f"needs {row.values[0].package}")


@pytest.mark.parametrize(("base", "method", "oracle"), WHOLE, ids=[f"{base}-{method}" for base, method, _ in WHOLE])
def test_one_setting_for_all_modules(base: str, method: str, oracle: Oracle) -> None:
    installed(base)
    model = load(small_model(), dtype=torch.float32, quantization_config=settings(base, method))
    check_weights(model, lambda name: oracle, small_model())


@pytest.mark.parametrize(("base", "narrow", "wide"), MIXED, ids=[row[0] for row in MIXED])
def test_two_widths_in_one_model(base: str, narrow: Oracle, wide: Oracle) -> None:
    installed(base)
    config = settings(base, "mixed")
    check_settings("base", config.to_dict())
    model = load(small_model(), dtype=torch.float32, quantization_config=config)
    check_weights(model, lambda name: wide if name.removeprefix("model.") in WIDE else narrow, small_model())
    assert "lm_head" not in quantized_modules(model)


@pytest.mark.parametrize("base", ["torchao-int2", "torchao-int3", "nf4"])
def test_two_widths_are_saved_and_loaded_by_transformers_alone(base: str, tmp_path: Path) -> None:
    installed(base)
    model = load(small_model(), dtype="auto", quantization_config=settings(base, "mixed"))
    wanted = logits(model)
    model = load(small_model(), dtype="auto", quantization_config=settings(base, "mixed"))
    model.save_pretrained(tmp_path)
    assert gap(load(tmp_path, dtype="auto"), wanted) == 0.0
    schemes = {
        name: str(backend.scheme(model.get_submodule(name))) for name, backend in quantized_modules(model).items()
    }
    assert len(set(schemes.values())) == (1 if base == "nf4" else 2)
    assert result_of("inspect", tmp_path)["modules"] == schemes  # read from the headers and the config alone


@pytest.mark.parametrize("base", ["torchao-int3", "nf4", "hqq-3", "quanto-int4"])
def test_biases_and_other_classes_keep_their_places(base: str, tmp_path: Path) -> None:
    """transformers would quantize the bias of a module that a torchao config names; AutoModel has no prefix."""
    installed(base)
    folder = biased_llama(tmp_path)
    model = load(folder, quantization_config=settings(base, "mixed"))
    plain, inner = load(folder), AutoModel.from_pretrained(folder, quantization_config=settings(base, "mixed"))
    backends = quantized_modules(inner)
    for name, backend in quantized_modules(model).items():
        assert torch.equal(model.get_submodule(name).bias.float(), plain.get_submodule(name).bias), name
        local = name.removeprefix("model.")
        ours, theirs = model.get_submodule(name), inner.get_submodule(local)
        assert backend.scheme(ours) == backends[local].scheme(theirs)
        assert torch.equal(read_weight(backend, name, ours), read_weight(backends[local], local, theirs))


@pytest.mark.parametrize("base", base_names())
def test_every_base_has_a_setting_or_says_why_not(base: str) -> None:
    installed(base)
    config = base_config(base)
    backend = backend_of(config)
    assert backend is not None
    before = config.to_dict()
    for found in (backend.finer(config), backend.wider(config), backend.partner(config)):
        if isinstance(found, Unavailable):
            assert found.reason
            assert not found.reason.endswith(".")
        elif found is not None:
            assert found.to_dict() != before
    assert config.to_dict() == before


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("base", rows("gptq-3"))
def test_gptq_has_both_for_all_modules_and_no_mixture(base: Any) -> None:
    config = base.config(small_model())
    backend = backend_of(config)
    assert backend is not None
    for changed, scheme in ((backend.finer(config), "gptq int3, groups of 64"), (backend.wider(config), "gptq int4")):
        model = load(small_model(), dtype=torch.float32, quantization_config=changed)
        name, found = next(iter(quantized_modules(model).items()))
        assert str(found.scheme(model.get_submodule(name))).startswith(scheme)
    refused = backend.partner(config)
    assert isinstance(refused, Unavailable)
    assert "one bit width for all modules" in refused.reason
