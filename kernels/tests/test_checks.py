"""Arguments that the functions refuse. Each error states what was expected, what was found and what to do."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from arguments import VALID

import glowq_kernels
from glowq_kernels import KernelError, twins

IMPLEMENTATIONS = pytest.mark.parametrize("package", [glowq_kernels, twins], ids=["kernel", "twin"])
HALF = torch.float16


FACTOR = {"product": torch.ones(2, 3), "left": torch.ones(16, 3)}
CODES = torch.zeros(3, 1, 16, dtype=torch.uint8)
BLOCKS = {"right": CODES, "scale": torch.ones(3), "multipliers": torch.ones(3, 1).to(torch.int8)}

CASES = [
    ("right", {"x": torch.ones(2, 16, dtype=torch.float64)}, "x must be float16 or bfloat16 or float32, found float64"),
    ("right", {"x": torch.tensor(1.0)}, r"x must have shape \(..., n\) with n at least 1, found \(\)"),
    ("right", {"x": torch.ones(2, 0), "right": torch.ones(3, 0)}, r"n at least 1, found \(2, 0\)"),
    (
        "right",
        {"right": torch.ones(3, 16).long()},
        "right must be a float of 16 or 32 bits or int8, or codes in uint8, found int64",
    ),
    ("right", {"right": torch.ones(3, 8)}, "one column for each of the 16 input channels of x, found 8"),
    ("right", {"right": torch.ones(0, 16)}, r"at least one, found shape \(0, 16\); leave out a correction of rank 0"),
    ("right", {"right": torch.ones(3, 16).to(torch.int8)}, "right is int8, which needs scale"),
    ("right", {"scale": torch.ones(3)}, "scale belongs to an int8 factor, found right of float32; drop it"),
    (
        "right",
        {"right": torch.ones(3, 16).to(torch.int8), "scale": torch.ones(4)},
        r"scale must have shape \(3,\), found \(4,\)",
    ),
    (
        "right",
        {"right": torch.ones(3, 16).to(torch.int8), "scale": torch.ones(3, dtype=HALF)},
        "scale must be float32, found float16",
    ),
    ("right", {"right": torch.ones(3, 16, device="meta")}, "found x on cpu, right on meta; move them"),
    ("right", {"right": torch.ones(3, 16, requires_grad=True)}, "found right requiring a gradient; call them under"),
    ("left_add_", {"output": torch.ones(2, 8).int()}, "output must be float16 or bfloat16 or float32, found int32"),
    ("left_add_", {"left": torch.ones(7, 3)}, "left must have one row for each of the 8 outputs, found 7"),
    ("left_add_", {"product": torch.ones(2, 4)}, r"product must have shape \(2, 3\).* found \(2, 4\)"),
    ("left_add_", {"product": torch.ones(1, 3)}, r"product must have shape \(2, 3\).* found \(1, 3\)"),
    (
        "left_add_",
        {"left": torch.ones(8, 0), "product": torch.ones(2, 0)},
        r"as many columns as the rank, at least one, found shape \(8, 0\)",
    ),
    ("left_add_", {"left": torch.ones(8, 3).to(torch.int8)}, "left is int8, which needs scale"),
    ("left_add_", {"output": torch.ones(1, 8).expand(2, 8)}, "may share memory, found .*; call contiguous"),
    ("left_add_", {"output": torch.ones(9).as_strided((2, 8), (1, 1))}, "may share memory, found .*; call contiguous"),
    ("gptq_linear", {"bits": 8}, "bits must be 4, nothing else is implemented, found 8"),
    ("gptq_linear", {"group_size": 0}, "group_size must be positive, or -1 for one group, found 0"),
    ("gptq_linear", {"x": torch.ones(2, 56)}, r"qweight must be int32 of shape \(d / 8, o\), where d = 56"),
    ("gptq_linear", {"x": torch.ones(2, 60)}, r"where d = 60 .* must be a multiple of 8"),
    ("gptq_linear", {"qweight": torch.zeros(8, 16)}, r"found float32 \(8, 16\)"),
    ("gptq_linear", {"qweight": torch.zeros(8, 12, dtype=torch.int32)}, "a multiple of 8 columns.* found 12"),
    ("gptq_linear", {"scales": torch.ones(3, 16)}, r"scales must have shape \(2, 16\), found \(3, 16\)"),
    ("gptq_linear", {"scales": torch.ones(2, 16).double()}, "scales must be float16 or .* found float64"),
    ("gptq_linear", {"qzeros": torch.zeros(2, 16, dtype=torch.int32)}, r"qzeros must have shape \(2, 2\)"),
    ("gptq_linear", {"qzeros": torch.zeros(2, 2)}, "qzeros must be int32, found float32"),
    ("gptq_linear", {"g_idx": torch.zeros(63, dtype=torch.int32)}, r"g_idx must have shape \(64,\), found \(63,\)"),
    ("gptq_linear", {"g_idx": torch.zeros(64)}, "g_idx must be int32 or int64, found float32"),
    (
        "gptq_linear",
        {"qweight": torch.zeros(16, 8, dtype=torch.int32).T},
        r"qweight must be contiguous, found strides \(1, 8\); call contiguous\(\) once",
    ),
    ("gptq_linear", {"bias": torch.ones(8)}, r"bias must have shape \(16,\), found \(8,\)"),
    ("gptq_linear", {"bias": torch.ones(16).int()}, "bias must be float16 or .* found int32"),
    ("gptq_linear", {"product": torch.ones(2, 3)}, "found product without left; pass both or neither"),
    ("gptq_linear", {"left": torch.ones(16, 3)}, "found left without product; pass both or neither"),
    ("gptq_linear", {"left_scale": torch.ones(16)}, "left_scale must come with left, found it alone"),
    ("gptq_linear", {**FACTOR, "left": torch.ones(8, 3)}, "one row for each of the 16 outputs, found 8"),
    ("gptq_linear", {**FACTOR, "product": torch.ones(3, 3)}, r"product must have shape \(2, 3\).* found \(3, 3\)"),
    ("gptq_linear", {**FACTOR, "left": torch.ones(16, 3).to(torch.int8)}, "left is int8, which needs left_scale"),
    ("nf4_linear", {"x": torch.ones(2, 63)}, "even number of input channels.* found 63"),
    ("nf4_linear", {"blocksize": 48}, "blocksize must be a power of two.* found 48"),
    ("nf4_linear", {"blocksize": 1}, "blocksize must be a power of two.* found 1"),
    ("nf4_linear", {"out_features": 0}, "out_features must be at least 1, found 0"),
    ("nf4_linear", {"out_features": 16}, r"must hold 512 bytes.*weight \(16, 64\), found 256; check out_features"),
    ("nf4_linear", {"qweight": torch.zeros(256)}, "qweight must be uint8, found float32"),
    ("nf4_linear", {"absmax": torch.ones(7)}, r"absmax must have shape \(8,\), found \(7,\)"),
    ("nf4_linear", {"absmax": torch.ones(8).to(torch.uint8)}, "absmax must be float32, found uint8"),
    ("nf4_linear", {"code": torch.ones(256)}, r"code must have shape \(16,\), found \(256,\)"),
    ("nf4_linear", {"code": torch.ones(16, dtype=HALF)}, "code must be float32, found float16"),
    ("nf4_linear", {"bias": torch.ones(8, 1)}, r"bias must have shape \(8,\), found \(8, 1\)"),
]


@IMPLEMENTATIONS
@pytest.mark.parametrize(("name", "changes", "message"), CASES)
def test_refusals(package: ModuleType, name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        getattr(package, name)(**{**VALID[name](), **changes})


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", list(VALID))
def test_what_the_refusals_start_from_is_taken(package: ModuleType, name: str, device: torch.device) -> None:
    arguments = VALID[name]()
    getattr(package, name)(
        **{key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    )


def test_a_parameter_is_taken_where_no_gradient_is_wanted(device: torch.device) -> None:
    factor = torch.nn.Parameter(torch.ones(3, 16, device=device))
    with torch.no_grad():
        assert not glowq_kernels.right(torch.ones(2, 16, device=device), factor).requires_grad


def test_a_kernel_error_is_a_value_error() -> None:
    assert issubclass(KernelError, ValueError)


def test_nothing_is_written_by_a_refused_call() -> None:
    output = torch.ones(2, 8)
    with pytest.raises(KernelError):
        glowq_kernels.left_add_(output, torch.ones(2, 3), torch.ones(7, 3))
    assert (output == 1).all()
