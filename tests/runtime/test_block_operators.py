"""The operators with factors in blocks of 4 or 3 bits: they compute what the matrices of the same numbers compute."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from glowq.factors.blocks import pack_blocks, round_blocks
from glowq.runtime import operators

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(), (3,), (2, 3), (17,), (0,), (2, 0)]

modes = pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=["grad", "no_grad", "inference"]
)
both_ops = pytest.mark.parametrize("ops", [operators, torch.ops.glowq], ids=["function", "dispatcher"])
all_bits = pytest.mark.parametrize("bits", [4, 3])


def numbers(rows: int, width: int, bits: int) -> Tensor:
    """Draw whole numbers that blocks of `bits` bits hold, int8, shape (rows, width)."""
    return round_blocks(torch.randn(rows, width) * 40, bits).to(torch.int8)


def right_of(plain: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and multipliers of a right factor with these numbers, shape (r, d)."""
    return pack_blocks(plain, bits)


def left_of(plain: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and multipliers of a left factor with these numbers, shape (o, r)."""
    codes, multipliers = pack_blocks(plain.T, bits)
    return codes.transpose(0, 1).contiguous(), multipliers.T.contiguous()


@both_ops
@modes
@all_bits
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rank", "channels"), [(1, 24), (16, 32), (5, 80)])
def test_products(ops: Any, mode: Any, bits: int, shape: tuple[int, ...], rank: int, channels: int) -> None:
    """The oracle are the same products of int8 matrices, which other tests compare with float64."""
    plain, plain_left = numbers(rank, channels, bits), numbers(rank, 33, bits).T.contiguous()
    (right, multipliers), (left, left_multipliers) = right_of(plain, bits), left_of(plain_left, bits)
    scale, left_scale = torch.full((rank,), 2.0**-6), torch.full((33,), 2.0**-7)
    for dtype in DTYPES:
        x = torch.randn(*shape, channels).to(dtype)
        with mode():
            product = ops.right(x, right, scale, multipliers)
            whole = ops.correction(x, right, left, scale, left_scale, multipliers, left_multipliers)
            one = ops.left(product, left, left_scale, left_multipliers)
            expected = ops.right(x, plain, scale)
            assert torch.equal(product, expected)
            assert torch.equal(one, ops.left(expected, plain_left, left_scale))
            assert torch.equal(whole, ops.correction(x, plain, plain_left, scale, left_scale))
            output = torch.randn(*shape, 33).to(dtype)
            other = output.clone()
            ops.left_add_(output, product, left, left_scale, left_multipliers)
            ops.left_add_(other, product, plain_left, left_scale)
        assert torch.equal(output, other)


@all_bits
def test_torchs_own_checks(bits: int) -> None:
    (right, multipliers), (left, others) = right_of(numbers(16, 64, bits), bits), left_of(numbers(16, 6, bits).T, bits)
    scale, left_scale = torch.ones(16) / 64, torch.ones(6) / 128
    for dtype, grad in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        x, product = torch.randn(3, 64).to(dtype).requires_grad_(grad), torch.randn(3, 16).to(dtype)
        near = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 64 * torch.finfo(dtype).eps}
        for operator, arguments in (
            (torch.ops.glowq.right.default, (x, right, scale, multipliers)),
            (torch.ops.glowq.left.default, (product, left, left_scale, others)),
            (torch.ops.glowq.correction.default, (x, right, left, scale, left_scale, multipliers, others)),
            (torch.ops.glowq.left_add_.default, (torch.randn(3, 6).to(dtype), product, left, left_scale, others)),
        ):
            assert set(torch.library.opcheck(operator, arguments, **near).values()) == {"SUCCESS"}
