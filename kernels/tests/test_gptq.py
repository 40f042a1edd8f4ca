"""`gptq_linear` against a float64 product with weights that the test packs, and against gptqmodel's module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles import GPTQWeight, assert_linear, correction, packed_by_gptqmodel, random_gptq, rounding, scattered
from torch import Tensor

import glowq_kernels
from glowq_kernels import twins

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(params=[glowq_kernels, twins], ids=["kernel", "twin"])
def gptq_linear(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return request.param.gptq_linear


def check(gptq_linear: Callable[..., Tensor], x: Tensor, weight: GPTQWeight, **extra: Tensor | None) -> None:
    actual = gptq_linear(x, **weight.arguments, **extra)
    # Some tiles round the dequantized weight, which is float32, to the dtype of x.
    assert_linear(actual, x, weight.weight, weight.magnitude, weights=rounding(x.dtype), **extra)


@pytest.mark.parametrize("shape", [(1, 8), (1, 1064), (2, 136), (3, 40), (16, 264), (17, 72), (2, 3, 64), (64,)])
@pytest.mark.parametrize("outputs", [8, 72])
def test_shapes(
    gptq_linear: Callable[..., Tensor],
    poisoned: list[Tensor],
    device: torch.device,
    shape: tuple[int, ...],
    outputs: int,
) -> None:
    x = scattered(torch.randn(shape).to(device))
    extra = {"bias": torch.randn(outputs, device=device), **correction(shape, outputs, 5, torch.float32, device)}
    check(gptq_linear, x, random_gptq(shape[-1], outputs, 32, device), **extra)


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1, 12, 512])
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("tokens", [1, 2])
def test_groups(
    gptq_linear: Callable[..., Tensor],
    poisoned: list[Tensor],
    device: torch.device,
    group_size: int,
    zero_offset: int,
    tokens: int,
) -> None:
    """Group sizes that divide the tile size or not, that do not divide d, and that are larger than d."""
    x = torch.randn(tokens, 264, device=device)
    check(gptq_linear, x, random_gptq(264, 40, group_size, device, zero_offset=zero_offset))


@pytest.mark.parametrize("group_size", [16, 128, -1])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_act_order(
    gptq_linear: Callable[..., Tensor],
    poisoned: list[Tensor],
    device: torch.device,
    group_size: int,
    tokens: int,
    index: torch.dtype,
) -> None:
    weight = random_gptq(256, 40, group_size, device, zero_offset=1, order=True)
    weight.arguments["g_idx"] = weight.arguments["g_idx"].to(index)
    check(gptq_linear, torch.randn(tokens, 256, device=device), weight)


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("other_dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("order", [False, True])
def test_dtypes(
    gptq_linear: Callable[..., Tensor],
    poisoned: list[Tensor],
    device: torch.device,
    x_dtype: torch.dtype,
    other_dtype: torch.dtype,
    tokens: int,
    order: bool,
) -> None:
    x = torch.randn(tokens, 136).to(device, x_dtype)
    extra = {
        "bias": torch.randn(24).to(device, other_dtype),
        **correction(x.shape, 24, 6, other_dtype, device),
    }
    check(gptq_linear, x, random_gptq(136, 24, 128, device, order=order, scale_dtype=other_dtype), **extra)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_no_weight_is_rounded(device: torch.device, dtype: torch.dtype, tokens: int, group_size: int) -> None:
    """If a tile has one group, the error is that of float32 sums; a rounded weight would have a far larger error."""
    weight = random_gptq(256, 16, group_size, device)
    x = torch.randn(tokens, 256).to(device, dtype)
    left = torch.randn(16, 1, device=device)
    # The correction cancels most of the output, so that rounding the output does not hide errors of the weight.
    product = torch.ones(tokens, 1, device=device)
    left[:, 0] = -(x[0].double().cpu() @ weight.weight).float().to(device)
    actual = glowq_kernels.gptq_linear(x, **weight.arguments, product=product, left=left)
    assert_linear(actual, x, weight.weight, weight.magnitude, product=product, left=left)


@pytest.mark.parametrize("rank", [1, 32, 64, 100, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("tokens", [1, 17])
def test_ranks(
    gptq_linear: Callable[..., Tensor],
    poisoned: list[Tensor],
    device: torch.device,
    rank: int,
    dtype: torch.dtype,
    tokens: int,
) -> None:
    x = torch.randn(tokens, 64, device=device)
    check(gptq_linear, x, random_gptq(64, 40, 32, device), **correction(x.shape, 40, rank, dtype, device))


def test_transposed_product_and_factor(gptq_linear: Callable[..., Tensor], device: torch.device) -> None:
    product, left = torch.randn(4, 3, device=device).T, torch.randn(4, 40, device=device).T
    x = torch.randn(3, 64, device=device)
    check(gptq_linear, x, random_gptq(64, 40, 32, device), product=product, left=left)


def test_what_right_returns_is_what_it_takes(device: torch.device) -> None:
    weight, x = random_gptq(64, 40, 32, device), torch.randn(2, 3, 64, device=device)
    right, left = torch.randn(4, 64, device=device), torch.randn(40, 4, device=device)
    product = glowq_kernels.right(x, right)
    fused = glowq_kernels.gptq_linear(x, **weight.arguments, product=product, left=left)
    apart = glowq_kernels.gptq_linear(x, **weight.arguments)
    glowq_kernels.left_add_(apart, product, left)
    assert torch.allclose(fused, apart, rtol=1e-4, atol=1e-3)  # float32 sums of about 70 terms, each of about 5


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_tokens(gptq_linear: Callable[..., Tensor], device: torch.device, shape: tuple[int, ...]) -> None:
    weight = random_gptq(64, 24, 32, device)
    extra = correction(shape, 24, 4, torch.float32, device)
    assert gptq_linear(torch.randn(shape, device=device), **weight.arguments, **extra).shape == (*shape[:-1], 24)


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("order", [False, True])
def test_the_same_bits_every_time(device: torch.device, tokens: int, order: bool) -> None:
    weight, x = random_gptq(512, 40, 64, device, order=order), torch.randn(tokens, 512, device=device)
    extra = correction(x.shape, 40, 32, torch.float16, device)
    first, again = (glowq_kernels.gptq_linear(x, **weight.arguments, **extra) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_gptqmodel_packs_what_is_unpacked_here(device: torch.device, order: bool, tokens: int) -> None:
    packing = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    inputs, outputs, size = 128, 64, 32
    codes, zeros = torch.randint(0, 16, (outputs, inputs)), torch.randint(0, 16, (outputs, inputs // size))
    scales = (torch.rand(outputs, inputs // size) + 0.1).half().float()
    groups = torch.arange(inputs) // size
    groups = groups[torch.randperm(inputs)] if order else groups
    module = packed_by_gptqmodel(codes, zeros, scales, groups, bias=True, group_size=size)
    weight = (codes - zeros[:, groups]) * scales[:, groups]
    module.enable_wf_unsqueeze = True
    buffers = {name: getattr(module, name).to(device) for name in ("qweight", "qzeros", "scales", "bias")}
    x = torch.randn(tokens, inputs, device=device)
    actual = glowq_kernels.gptq_linear(x, **buffers, group_size=size, g_idx=module.g_idx.to(device) if order else None)
    theirs = packing.PackableQuantLinear.dequantize_weight(module).double().cpu()
    bias, magnitude = buffers["bias"], 31 * scales[:, groups].double().T
    assert_linear(actual, x, weight.double().T, magnitude, bias=bias)
    # gptqmodel rounds its dequantized weight to float16.
    assert_linear(actual, x, theirs, magnitude, bias=bias, weights=2.0**-11)
