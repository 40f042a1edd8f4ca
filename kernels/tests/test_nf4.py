"""`nf4_linear` against a float64 product with weights that the test packs, and against bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import assert_linear, correction, random_nf4, rounding, scattered, surrounded
from torch import Tensor

import glowq_kernels
from glowq_kernels import twins

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(params=[glowq_kernels, twins], ids=["kernel", "twin"])
def nf4_linear(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return request.param.nf4_linear


def check(
    nf4_linear: Callable[..., Tensor], x: Tensor, arguments: dict[str, Any], weight: Tensor, **extra: Tensor | None
) -> None:
    actual = nf4_linear(x, **arguments, **extra)
    assert_linear(actual, x, weight.T, weight.T.abs(), weights=rounding(x.dtype), **extra)


@pytest.mark.parametrize("shape", [(1, 2), (1, 2500), (2, 136), (3, 66), (16, 258), (17, 96), (2, 3, 64), (64,)])
@pytest.mark.parametrize("outputs", [1, 39])
def test_shapes(
    nf4_linear: Callable[..., Tensor],
    poisoned: list[Tensor],
    device: torch.device,
    shape: tuple[int, ...],
    outputs: int,
) -> None:
    x = scattered(torch.randn(shape).to(device))
    extra = {"bias": torch.randn(outputs, device=device), **correction(shape, outputs, 5, torch.float32, device)}
    check(nf4_linear, x, *random_nf4(shape[-1], outputs, 64, device), **extra)


@pytest.mark.parametrize("blocksize", [2, 32, 64, 256, 4096])
@pytest.mark.parametrize("inputs", [128, 130, 160])
@pytest.mark.parametrize("tokens", [1, 2])
def test_blocks(
    nf4_linear: Callable[..., Tensor],
    poisoned: list[Tensor],
    device: torch.device,
    blocksize: int,
    inputs: int,
    tokens: int,
) -> None:
    """Blocks that end at the ends of rows, that continue in the next row, and that hold many rows."""
    check(nf4_linear, torch.randn(tokens, inputs, device=device), *random_nf4(inputs, 35, blocksize, device))


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("other_dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_dtypes(
    nf4_linear: Callable[..., Tensor],
    poisoned: list[Tensor],
    device: torch.device,
    x_dtype: torch.dtype,
    other_dtype: torch.dtype,
    tokens: int,
) -> None:
    x = torch.randn(tokens, 192).to(device, x_dtype)
    extra = {"bias": torch.randn(24).to(device, other_dtype), **correction(x.shape, 24, 6, other_dtype, device)}
    check(nf4_linear, x, *random_nf4(192, 24, 64, device), **extra)


@pytest.mark.parametrize("rank", [1, 32, 64, 100, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("tokens", [1, 17])
def test_ranks(
    nf4_linear: Callable[..., Tensor],
    poisoned: list[Tensor],
    device: torch.device,
    rank: int,
    dtype: torch.dtype,
    tokens: int,
) -> None:
    x = torch.randn(tokens, 64, device=device)
    check(nf4_linear, x, *random_nf4(64, 40, 64, device), **correction(x.shape, 40, rank, dtype, device))


def test_transposed_product_and_factor(nf4_linear: Callable[..., Tensor], device: torch.device) -> None:
    product, left = torch.randn(4, 3, device=device).T, torch.randn(4, 40, device=device).T
    x = torch.randn(3, 64, device=device)
    check(nf4_linear, x, *random_nf4(64, 40, 64, device), product=product, left=left)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_tokens(nf4_linear: Callable[..., Tensor], device: torch.device, shape: tuple[int, ...]) -> None:
    arguments, _ = random_nf4(64, 24, 64, device)
    extra = correction(shape, 24, 4, torch.float32, device)
    assert nf4_linear(torch.randn(shape, device=device), **arguments, **extra).shape == (*shape[:-1], 24)


@pytest.mark.parametrize("tokens", [1, 6])
def test_the_same_bits_every_time(device: torch.device, tokens: int) -> None:
    arguments, _ = random_nf4(512, 40, 64, device)
    x = torch.randn(tokens, 512, device=device)
    extra = correction(x.shape, 40, 32, torch.float16, device)
    first, again = (glowq_kernels.nf4_linear(x, **arguments, **extra) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True], ids=["", "double"])
@pytest.mark.parametrize(("inputs", "blocksize"), [(128, 64), (96, 64), (130, 128)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_bitsandbytes_packs_what_is_unpacked_here(
    device: torch.device, quant_type: str, double: bool, inputs: int, blocksize: int, tokens: int
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    # One row: if rows end inside a block, dequantize_4bit of bitsandbytes 0.50 gives wrong values on the CPU.
    flat = torch.randn(1, 40 * inputs)
    packed, state = functional.quantize_4bit(
        flat, quant_type=quant_type, blocksize=blocksize, compress_statistics=double
    )
    absmax = state.absmax
    if double:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    theirs = functional.dequantize_4bit(packed, state).double().view(40, inputs)
    x = torch.randn(tokens, inputs, device=device)
    tensors = (surrounded(tensor.to(device))[0] for tensor in (packed, absmax.float(), state.code))
    actual = glowq_kernels.nf4_linear(x, *tensors, blocksize=state.blocksize, out_features=40)
    assert_linear(actual, x, theirs.T, theirs.T.abs(), weights=2.0**-24)
