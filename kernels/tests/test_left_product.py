"""`left_add_` against a float64 product, for several shapes, dtypes and strides. It writes only the output."""

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
def left_add_(request: pytest.FixtureRequest) -> Callable[..., None]:
    return request.param.left_add_


def check(left_add_: Callable[..., None], output: Tensor, product: Tensor, left: Tensor, scale: Tensor | None) -> None:
    before, entries, factor = output.double().cpu(), product.double().cpu(), dense(left, scale)
    expected = before + entries @ factor.T
    magnitude = before.abs() + entries.abs() @ factor.abs().T
    left_add_(output, product, left, scale)
    assert_close(output, expected, magnitude, left.shape[1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (2, 33), (3, 64), (16, 31), (17, 96), (2, 3, 40), (40,)])
@pytest.mark.parametrize("rank", [1, 5, 32])
def test_shapes(left_add_: Callable[..., None], device: torch.device, shape: tuple[int, ...], rank: int) -> None:
    product = torch.randn(*shape[:-1], rank, device=device)
    output = scattered(torch.randn(shape, device=device))
    check(left_add_, output, product, *random_factor(shape[-1], rank, torch.float32, device))
    whole = output._base
    assert whole.isnan().sum() == whole.numel() - output.numel()


@pytest.mark.parametrize("rank", [64, 100, 128])
@pytest.mark.parametrize("tokens", [1, 2])
def test_large_ranks(left_add_: Callable[..., None], device: torch.device, rank: int, tokens: int) -> None:
    output, product = torch.randn(tokens, 40, device=device), torch.randn(tokens, rank, device=device)
    check(left_add_, output, product, *random_factor(40, rank, torch.float16, device))


@pytest.mark.parametrize("output_dtype", FLOATS)
@pytest.mark.parametrize("factor_dtype", [*FLOATS, torch.int8])
@pytest.mark.parametrize("tokens", [1, 3])
def test_dtypes(
    left_add_: Callable[..., None],
    device: torch.device,
    output_dtype: torch.dtype,
    factor_dtype: torch.dtype,
    tokens: int,
) -> None:
    output = torch.randn(tokens, 40).to(device, output_dtype)
    product = torch.randn(tokens, 6).to(device, output_dtype if factor_dtype is torch.int8 else factor_dtype)
    check(left_add_, output, product, *random_factor(40, 6, factor_dtype, device))


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (2, 33), (3, 64), (17, 96), (2, 3, 40), (0, 64)])
@pytest.mark.parametrize("rank", [1, 5, 70])
def test_blocks(
    left_add_: Callable[..., None], device: torch.device, bits: int, shape: tuple[int, ...], rank: int
) -> None:
    codes, multipliers, numbers = random_blocks(rank, shape[-1], bits, device)
    scale = torch.rand(shape[-1], device=device) / 64
    output, product = torch.randn(shape, device=device), torch.randn(*shape[:-1], rank, device=device)
    before, entries = output.double().cpu(), product.double().cpu()
    factor = numbers.T * scale.double().cpu()[:, None]
    left_add_(output, product, codes.transpose(0, 1).contiguous(), scale, multipliers.T.contiguous())
    magnitude = before.abs() + entries.abs() @ factor.abs().T
    assert_close(output, before + entries @ factor.T, magnitude, rank)


def test_members_of_a_group_in_one_output(left_add_: Callable[..., None], device: torch.device) -> None:
    """Adding each member to its slice of the outputs gives the same result as adding all members at once."""
    # Whole numbers, whose sums are exact in any order: that of the interpreter depends on the processor and the width.
    output, product, left = (
        torch.randint(-99, 99, shape, device=device).float() for shape in ((2, 48), (2, 4), (48, 4))
    )
    together, apart = output.clone(), output.clone()
    left_add_(together, product, left)
    for start, stop in ((0, 32), (32, 40), (40, 48)):
        left_add_(apart[:, start:stop], product, left[start:stop])
    assert torch.equal(together, apart)


def test_one_rounding(left_add_: Callable[..., None], device: torch.device) -> None:
    """The sum is rounded once.

    Between 2048 and 4096 float16 numbers are 2 apart: if each addition of 0.75 were rounded, the sum would stay 2048.
    """
    output = torch.full((1, 8), 2048.0, dtype=torch.float16, device=device)
    product = torch.full((1, 2), 0.75, dtype=torch.float16, device=device)
    left_add_(output, product, torch.ones(8, 2, dtype=torch.float16, device=device))
    assert (output == 2050).all()


def test_leading_dimensions_that_no_single_stride_walks(left_add_: Callable[..., None], device: torch.device) -> None:
    output = torch.randn(3, 2, 16, device=device).transpose(0, 1)
    check(left_add_, output, torch.randn(2, 3, 4, device=device), torch.randn(16, 4, device=device), None)


def test_transposed_product_and_factor(left_add_: Callable[..., None], device: torch.device) -> None:
    product, left = torch.randn(4, 3, device=device).T, torch.randn(4, 20, device=device).T
    check(left_add_, torch.randn(3, 20, device=device), product, left, None)


def test_no_tokens(left_add_: Callable[..., None], device: torch.device) -> None:
    output = torch.randn(0, 16, device=device)
    left_add_(output, torch.randn(0, 4, device=device), torch.randn(16, 4, device=device))
    assert output.shape == (0, 16)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_version_counter_moves(left_add_: Callable[..., None], device: torch.device, transposed: bool) -> None:
    """The version counter of the output increases, as for an in-place operation of torch."""
    output = torch.zeros(2, 3, 8, device=device)
    output = output.transpose(0, 1) if transposed else output
    version = output._version
    left_add_(output, torch.ones(*output.shape[:-1], 1, device=device), torch.ones(8, 1, device=device))
    assert output._version > version


@pytest.mark.parametrize("tokens", [1, 6])
def test_the_same_bits_every_time(device: torch.device, tokens: int) -> None:
    output, product = torch.randn(tokens, 70, device=device), torch.randn(tokens, 100, device=device)
    left, again = torch.randn(70, 100, device=device), output.clone()
    glowq_kernels.left_add_(output, product, left)
    glowq_kernels.left_add_(again, product, left)
    assert torch.equal(output, again)
