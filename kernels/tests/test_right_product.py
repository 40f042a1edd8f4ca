"""`right` against a float64 product, for several shapes, dtypes and strides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles import assert_close, dense, random_blocks, random_factor, scattered
from torch import Tensor

import glowq_kernels
from glowq_kernels import twins

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(params=[glowq_kernels, twins], ids=["kernel", "twin"])
def right(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return request.param.right


def check(right: Callable[..., Tensor], x: Tensor, factor: Tensor, scale: Tensor | None) -> Tensor:
    actual = right(x, factor, scale)
    assert actual.is_contiguous()
    assert actual.dtype == (x.dtype if factor.dtype is torch.int8 else factor.dtype)
    plain, exact = x.double().cpu(), dense(factor, scale)
    assert_close(actual, plain @ exact.T, plain.abs() @ exact.abs().T, x.shape[-1])
    return actual


@pytest.mark.parametrize("shape", [(1, 7), (1, 4104), (2, 1000), (3, 64), (16, 257), (17, 96), (2, 3, 40), (40,)])
@pytest.mark.parametrize("rank", [1, 5, 32])
def test_shapes(
    right: Callable[..., Tensor], poisoned: list[Tensor], device: torch.device, shape: tuple[int, ...], rank: int
) -> None:
    x = scattered(torch.randn(shape).to(device))
    check(right, x, *random_factor(rank, shape[-1], torch.float32, device))


@pytest.mark.parametrize("rank", [64, 128])
def test_large_ranks(right: Callable[..., Tensor], poisoned: list[Tensor], device: torch.device, rank: int) -> None:
    check(right, torch.randn(2, 72, device=device), *random_factor(rank, 72, torch.float16, device))


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("factor_dtype", [*FLOATS, torch.int8])
@pytest.mark.parametrize("tokens", [1, 3])
def test_dtypes(
    right: Callable[..., Tensor],
    poisoned: list[Tensor],
    device: torch.device,
    x_dtype: torch.dtype,
    factor_dtype: torch.dtype,
    tokens: int,
) -> None:
    x = torch.randn(tokens, 200).to(device, x_dtype)
    check(right, x, *random_factor(6, 200, factor_dtype, device))


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("shape", [(1, 7), (1, 32), (2, 1000), (3, 64), (17, 96), (2, 3, 40), (0, 64)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_blocks(
    right: Callable[..., Tensor], device: torch.device, bits: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    codes, multipliers, numbers = random_blocks(5, shape[-1], bits, device)
    x, scale = torch.randn(shape).to(device, dtype), torch.rand(5, device=device) / 64
    actual = right(x, codes, scale, multipliers)
    assert actual.dtype == dtype
    plain, exact = x.double().cpu(), numbers * scale.double().cpu()[:, None]
    assert_close(actual, plain @ exact.T, plain.abs() @ exact.abs().T, shape[-1])


def test_transposed_input_and_factor(
    right: Callable[..., Tensor], poisoned: list[Tensor], device: torch.device
) -> None:
    x, factor = torch.randn(24, 5, device=device).T, torch.randn(24, 3, device=device).T
    check(right, x, factor, None)


def test_leading_dimensions_that_no_single_stride_walks(
    right: Callable[..., Tensor], poisoned: list[Tensor], device: torch.device
) -> None:
    x = torch.randn(3, 2, 16, device=device).transpose(0, 1)
    assert check(right, x, torch.randn(4, 16, device=device), None).shape == (2, 3, 4)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_tokens(right: Callable[..., Tensor], device: torch.device, shape: tuple[int, ...]) -> None:
    factor = torch.randn(4, 16, dtype=torch.float16, device=device)
    result = right(torch.randn(shape, device=device), factor)
    assert result.shape == (*shape[:-1], 4)
    assert result.dtype is torch.float16


@pytest.mark.parametrize("tokens", [1, 6])
def test_the_same_bits_every_time(device: torch.device, tokens: int) -> None:
    x, factor = torch.randn(tokens, 5000, device=device), torch.randn(7, 5000, device=device)
    assert torch.equal(glowq_kernels.right(x, factor), glowq_kernels.right(x, factor))
