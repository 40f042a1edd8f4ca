"""Corrected layers of bitsandbytes and gptqmodel for tests of `glowq.runtime.fused`, and checks of their outputs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracles import assert_close, dense, packed_by_gptqmodel, rounding
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INPUTS, WIDTHS = 128, {"q": 64, "k": 32, "v": 96, "o": 64}
RANK = 5


@dataclass(frozen=True)
class Base:
    """One kind of packed layer.

    Attributes:
        kernel: name of the function of `glowq_kernels` that reads the layer.
        make: (inputs, outputs, bias, dtype) -> layer, on the CPU.
        read: layer -> the weight as its library dequantizes it, shape (o, d), and a bound on the size of the numbers
            from which each entry was computed.
        error: relative error of the entries of the dequantized weight.
    """

    kernel: str
    make: Callable[[int, int, bool, torch.dtype], nn.Module]
    read: Callable[[Any], tuple[Tensor, Tensor]]
    error: float


def bitsandbytes(quant_type: str, double: bool) -> Base:
    """A 4-bit layer of bitsandbytes."""

    def make(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> nn.Module:
        library = pytest.importorskip("bitsandbytes")
        options = {"compute_dtype": dtype, "compress_statistics": double, "quant_type": quant_type}
        layer = library.nn.Linear4bit(inputs, outputs, bias, **options).to("cpu")
        if bias:
            layer.bias = nn.Parameter(torch.randn(outputs).to(dtype), requires_grad=False)
        return layer

    def read(layer: Any) -> tuple[Tensor, Tensor]:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert weight.dtype is torch.float32  # the dtype before quantization, so dequantization does not round
        return weight.double().cpu(), weight.double().cpu().abs()

    return Base("nf4_linear", make, read, 2.0**-22)


def gptq(group_size: int, order: bool = False, bits: int = 4) -> Base:
    """An asymmetric layer of gptqmodel."""

    def make(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> nn.Module:
        pytest.importorskip("gptqmodel")
        size = inputs if group_size == -1 else group_size
        count = -(-inputs // size)
        groups = torch.arange(inputs) // size
        groups = groups[torch.randperm(inputs)] if order else groups
        codes = torch.randint(0, 2**bits, (outputs, inputs))
        zeros = torch.randint(0, 2**bits, (outputs, count))
        scales = (torch.rand(outputs, count) + 0.1).half().float() / 8
        return packed_by_gptqmodel(codes, zeros, scales, groups, bias=bias, bits=bits, group_size=group_size)

    def read(layer: Any) -> tuple[Tensor, Tensor]:
        weight = type(layer).dequantize_weight(layer).T.double().cpu()
        return weight, 31 * layer.scales[layer.g_idx.long()].T.double().cpu()

    return Base("gptq_linear", make, read, 2.0**-11)  # gptqmodel rounds the dequantized weight to float16


BASES = {
    "nf4": bitsandbytes("nf4", False),
    "nf4-double": bitsandbytes("nf4", True),
    "fp4": bitsandbytes("fp4", False),
    "fp4-double": bitsandbytes("fp4", True),
    "gptq": gptq(32),
    "gptq-rows": gptq(-1),
    "gptq-act-order": gptq(32, order=True),
}


everywhere = pytest.mark.parametrize("base", ["nf4-double", "gptq-act-order"])


class Layers(nn.Module):
    """Modules q, k and v, which read the same input, and o. `only` selects the modules to run."""

    def forward(self, x: Tensor, only: str = "qkvo") -> list[Tensor]:
        return [getattr(self, name)(x) for name in only]


def corrected(
    base: Base,
    device: torch.device,
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    factors: torch.dtype = torch.float32,
    inputs: int = INPUTS,
) -> Any:
    """Return `Layers` of a base with random corrections, on the device.

    Args:
        dtype: dtype in which bitsandbytes computes.
        factors: dtype of the factors; int8 and uint8 round them with `glowq.factors.integers`, to 8 and to 4 bits.
    """
    from glowq.factors.factors import GroupFactors
    from glowq.factors.group import Group
    from glowq.factors.integers import round_factors
    from glowq.quantizers.model import prepare_model
    from glowq.runtime.attach import attach

    model = Layers().eval()
    for name, outputs in WIDTHS.items():
        model.add_module(name, base.make(inputs, outputs, bias, dtype))
    model.to(device)
    prepare_model(model)
    bits = {torch.int8: 8, torch.uint8: 4}.get(factors)
    for members in (("q", "k", "v"), ("o",)):
        group = Group("+".join(members), members, inputs, tuple(WIDTHS[member] for member in members), "")
        right = torch.randn(RANK, inputs) / 4
        lefts = {member: torch.randn(WIDTHS[member], RANK) for member in members}
        if bits is not None:
            right, lefts = round_factors(right, lefts, bits)
        attach(
            model,
            GroupFactors(group, right, lefts, torch.zeros(RANK, dtype=torch.float64), 0.0, bits),
            dtype=factors if bits is None else torch.float32,
        )
    return model


def check(base: Base, model: Any, name: str, x: Tensor, found: Tensor, computed: torch.dtype | None = None) -> None:
    """Assert that `found` is the output of member `name` for x, within bounds that follow from the dtypes.

    Args:
        computed: dtype in which the layer computes, if it is not the dtype of x.
    """
    from glowq.runtime import operators
    from glowq.runtime.attach import attached

    container = next(part for part in attached(model).values() if name in part.group.members)
    left = container.lefts[container.group.members.index(name)]
    with torch.no_grad():
        product = operators.right(x, container.right.factor, container.right.scale).double().cpu()
    layer = model.get_submodule(name)
    weight, magnitude = base.read(layer)
    factor = dense(left.factor, left.scale)
    entries = x.to(computed or x.dtype).double().cpu()
    expected = entries @ weight.T + product @ factor.T
    size = entries.abs() @ magnitude.T + product.abs() @ factor.abs().T
    if layer.bias is not None:
        expected, size = expected + layer.bias.double().cpu(), size + layer.bias.double().cpu().abs()
    assert found.dtype == x.dtype
    # The output is rounded to the dtype of the computation, then to the dtype of x.
    coarsest = max([computed or x.dtype, x.dtype], key=rounding)
    error = base.error + rounding(computed or x.dtype)
    assert_close(found.to(coarsest), expected, size, x.shape[-1] + RANK, weights=error)


def run(model: Any, x: Tensor, only: str = "qkvo") -> list[Tensor]:
    with torch.no_grad():
        found: list[Tensor] = model(x, only)
    return found


def inputs(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, INPUTS).to(device, dtype)


def check_all(base: str, model: Any, x: Tensor, **options: Any) -> None:
    for name, found in zip(WIDTHS, run(model, x), strict=True):
        check(BASES[base], model, name, x, found, **options)


def make_like(model: Any) -> Any:
    """Return a copy of the model whose members are not fused."""
    model = copy.deepcopy(model)
    for name in WIDTHS:
        getattr(model, name).__dict__.pop("forward", None)
    return model


def as_before(model: Any, calls: Counter[str], x: Tensor, context: Callable[[], Any]) -> None:
    """Assert that a fused model runs no kernel in this context, and gives the same outputs as the model not fused."""
    plain = make_like(model)
    with context():
        expected = plain(x)
        found = model(x)
    assert not calls["nf4_linear"] + calls["gptq_linear"]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.requires_grad == other.requires_grad
        assert torch.equal(one, other)
