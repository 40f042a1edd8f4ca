"""ONNX Runtime's operators, compared with float64 products of the weights that the quantization library dequantizes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from glowq.errors import ExportError
from glowq.integrations.onnx.operators import MatMulBnb4, MatMulNBits, Operator, operator_of
from glowq.quantizers.model import prepare_model, quantized_modules
from glowq.quantizers.registry import find_backend
from support import writers
from support.bases import Base, rows, small_model

FLOATS = ("nf4", "nf4-double", "fp4", "fp4-double")
WHOLE = ("torchao-int8", "torchao-int4", "torchao-int2", "quanto-int8", "w4a16", "w4a16-asym", "w8a16-channels")
BETWEEN = ("quanto-int2", "quanto-int4", "hqq-2", "hqq-4")  # zero points that are not integers
CALIBRATED = ("gptq-2", "gptq-4", "gptq-8", "gptqmodel-int8-rows", "auto-gptq-int4", "awq-int4")
INT8_INPUTS = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
MODULES = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")


def operator(model: nn.Module, name: str) -> Operator:
    module = model.get_submodule(name)
    found = operator_of(name, find_backend(module), module)
    assert found is not None
    return found


def runtime(made: Operator, x: Tensor) -> Tensor:
    """Run the operator in ONNX Runtime, as the only node of a graph."""
    outputs, inputs = made.shape
    tensors = [numpy_helper.from_array(tensor.numpy(), f"operand {n}") for n, tensor in enumerate(made.operands())]
    attributes = {"K": inputs, "N": outputs, **made.attributes()}
    names = ["x", *(tensor.name for tensor in tensors)]
    node = helper.make_node(made.kind, names, ["y"], domain="com.microsoft", **attributes)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in "xy"]
    graph = helper.make_graph([node], "one", ends[:1], ends[1:], tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def assert_computes(made: Operator, weight: Tensor, count: int) -> None:
    """Assert that ONNX Runtime and eager torch compute the product of `count` rows.

    The bound allows the rounding of the library's weight and of float32 sums, relative to a float64 product.
    """
    x = torch.randn(count, weight.shape[1], generator=torch.Generator().manual_seed(count))
    expected = x.double() @ weight.double().T
    unit = torch.finfo(weight.dtype).eps + math.sqrt(weight.shape[1]) * torch.finfo(torch.float32).eps
    bound = unit * (x.double().abs() @ weight.double().abs().T)
    for found in (runtime(made, x), made(x)):
        assert bool(((found - expected).abs() <= bound).all())


@pytest.mark.parametrize("base", rows(*FLOATS, *WHOLE, *BETWEEN))
def test_the_kernel_computes_what_the_library_dequantizes(base: Base) -> None:
    check(base)


@pytest.mark.slow
@pytest.mark.parametrize("base", rows(*CALIBRATED))
def test_the_kernel_computes_what_calibrated_libraries_dequantize(base: Base) -> None:
    check(base)


def check(base: Base) -> None:
    model = base.load(torch.float32)
    prepare_model(model)
    for name in MODULES:
        made, weight = operator(model, name), base.dequantize(model.get_submodule(name))
        assert isinstance(made, MatMulBnb4 if base.name in FLOATS else MatMulNBits)
        for count in (1, 5):  # decode and prefill are different kernels
            assert_computes(made, weight, count)


@pytest.mark.parametrize("base", rows("nf4-double", *WHOLE))
def test_a_weight_in_bfloat16_is_the_operators_rounded(base: Base) -> None:
    model = base.load(torch.bfloat16)
    prepare_model(model)
    for name in MODULES:
        weight = base.dequantize(model.get_submodule(name))
        assert weight.dtype == torch.bfloat16
        assert torch.equal(operator(model, name).dense().to(torch.bfloat16), weight), name


@pytest.mark.parametrize("base", rows("nf4", "fp4-double"))
def test_bitsandbytes_bytes_are_used_as_they_are(base: Base) -> None:
    model = base.load(torch.float32)
    prepare_model(model)
    assert torch.equal(operator(model, MODULES[0]).codes, model.get_submodule(MODULES[0]).weight.data.flatten())


def gptq(bits: int, group_size: int, zeros: Tensor | int, order: Tensor | None = None) -> nn.Module:
    """Return a module of gptqmodel with random codes: 48 outputs, 256 inputs."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    outputs, inputs = 48, 256
    module = TorchLinear(bits, group_size, False, order is not None, inputs, outputs, bias=True)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
    zeros = torch.as_tensor(zeros).expand(inputs // group_size, outputs)
    module.qweight.copy_(words(codes.T, bits).T)
    module.qzeros.copy_(words(zeros, bits))
    module.scales.copy_(torch.rand(inputs // group_size, outputs, generator=generator) + 0.1)
    module.g_idx.copy_(torch.arange(inputs) // group_size if order is None else order)
    module.bias.copy_(torch.randn(outputs, generator=generator))
    prepare_model(module)
    return module


def words(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension into int32 words, lowest bits first."""
    shifts = torch.arange(0, 32, bits)
    packed = (codes.long().unflatten(-1, (-1, len(shifts))) << shifts).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("mapping", ["symmetric", "asymmetric"])
def test_gptqs_layout(bits: int, mapping: str) -> None:
    drawn = torch.randint(0, 2**bits, (4, 48), generator=torch.Generator().manual_seed(5))
    module = gptq(bits, 64, 2 ** (bits - 1) if mapping == "symmetric" else drawn)
    made = operator_of("layer", find_backend(module), module)
    assert isinstance(made, MatMulNBits)
    assert (made.zeros is None) == (mapping == "symmetric")
    assert torch.equal(made.dense().half(), module.dequantize_weight().T)
    assert torch.equal(made.bias, module.bias.float())
    made.bias = None
    for count in (1, 5):
        assert_computes(made, module.dequantize_weight().T, count)


def test_act_order_is_refused() -> None:
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0)) // 64
    module = gptq(4, 64, 8, order)
    with pytest.raises(ExportError, match=r"layer \(gptq int4, .*act-order\).*desc_act.*--to merged"):
        operator_of("layer", find_backend(module), module)


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        *[(row, "3 bits a code, but MatMulNBits takes 2, 4, 8") for row in rows("torchao-int3", "hqq-3")],
        *[(row, "8 bits only with whole zero points") for row in rows("hqq-8")],
        *[(row, "not whole codes of 4 bits") for row in rows("hqq-saved-int4-axis-0")],
        *[(row, "not whole codes of 8 bits") for row in rows("quanto-float8")],
        *[(row, "rounds its inputs too") for row in rows("int8")],
    ],
    ids=lambda value: getattr(value, "id", None),
)
def test_packings_without_an_operator_are_refused_by_name(base: Any, reason: str) -> None:
    (row,) = base.values
    model = row.load(torch.float32)
    prepare_model(model)
    with pytest.raises(ExportError, match=reason) as refused:
        operator(model, MODULES[0])
    assert str(refused.value).startswith(f"{MODULES[0]} (")
    assert "--to merged" in str(refused.value)


def test_rounded_inputs_of_compressed_tensors_are_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    writers.compressed_tensors(small_model(), tmp_path, num_bits=8, strategy="channel", input_activations=INT8_INPUTS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ExportError, match=r"inputs rounded to int8.*rounds its inputs too"):
        operator(model, MODULES[0])


@pytest.mark.parametrize(("size", "reason"), [(8, "multiples of 16"), (48, None)])
def test_groups_of_torchao(size: int, reason: str | None) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    layer = nn.Sequential(nn.Linear(96, 40, bias=False))
    quantize_(layer, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(size)))
    if reason is not None:
        with pytest.raises(ExportError, match=reason):
            operator(layer, "0")
        return
    made = operator(layer, "0")
    assert made.attributes()["block_size"] == 16  # 48 is a multiple of 16, so each scale is stored three times
    assert_computes(made, layer[0].weight.dequantize(), 3)


def test_rows_of_a_length_that_no_block_divides() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Sequential(nn.Linear(100, 40, bias=False))
    quantize_(layer, Int8WeightOnlyConfig())
    assert_computes(operator(layer, "0"), layer[0].weight.dequantize(), 3)


def test_blocks_of_bitsandbytes_that_the_operator_does_not_take() -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(256, 64, bias=False, quant_type="nf4")
    layer.weight = Params4bit(torch.randn(64, 256), requires_grad=False, quant_type="nf4", blocksize=512).to("cpu")
    with pytest.raises(ExportError, match="MatMulBnb4 takes blocks of 16, 32, 64, 128, 256"):
        operator_of("layer", find_backend(layer), layer)


def test_dense_weights_need_no_operator() -> None:
    from transformers import AutoModelForCausalLM

    from glowq.quantizers.loading.dense import mark_dense

    model = AutoModelForCausalLM.from_pretrained(small_model())
    mark_dense(model)
    for name, backend in quantized_modules(model).items():
        assert operator_of(name, backend, model.get_submodule(name)) is None


def test_scales_of_a_block_of_zeros() -> None:
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = torch.randn(64, 256)
    weight[:, 64:128] = 0
    layer = Linear4bit(256, 64, bias=False, quant_type="nf4")
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", blocksize=64).to("cpu")
    made = operator_of("layer", find_backend(layer), layer)
    assert not made.dense()[:, 64:128].any()
    assert torch.equal(quantize_4bit(weight, blocksize=64, quant_type="nf4")[0].flatten(), made.codes)
