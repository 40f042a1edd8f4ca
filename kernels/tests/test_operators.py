"""On a GPU glowq's operators run the kernels for a few tokens, and torch's products for more tokens or float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracles import assert_close, scattered
from torch import Tensor

import glowq_kernels

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FEW = (1, 2, 3, 8, 15, 16)


@pytest.fixture
def operators(library: None) -> Any:
    """The module `glowq.runtime.operators`; glowq is not needed for the other tests of the kernels."""
    return pytest.importorskip("glowq.runtime.operators")


@pytest.fixture
def launched(operators: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels in the order of their calls. The cached answer of `unavailable` is cleared."""
    names: list[str] = []

    def record(name: str) -> None:
        function = getattr(glowq_kernels, name)

        def called(*arguments: Any) -> Any:
            names.append(name)
            return function(*arguments)

        monkeypatch.setattr(glowq_kernels, name, called)

    record("right")
    record("left_add_")
    operators.products.kernels.cache_clear()
    yield names
    operators.products.kernels.cache_clear()


def check(operators: Any, x: Tensor, right: Tensor, output: Tensor, left: Tensor) -> None:
    """Compare the right product and the addition of the left product with float64, separately."""
    assert_product(operators.products.right_on_gpu(x, right), x, right)
    product = torch.randn(*x.shape[:-1], right.shape[0]).to(left)
    before, entries, factor = (tensor.double().cpu() for tensor in (output, product, left))
    assert operators.products.left_add_on_gpu(output, product, left) is None
    assert_close(output, before + entries @ factor.T, before.abs() + entries.abs() @ factor.abs().T, left.shape[1])


def assert_product(found: Tensor, x: Tensor, right: Tensor) -> None:
    entries, factor = x.double().cpu(), right.double().cpu()
    assert found.dtype == right.dtype
    assert_close(found, entries @ factor.T, entries.abs() @ factor.abs().T, right.shape[1])


@pytest.mark.parametrize("tokens", FEW)
@pytest.mark.parametrize("factor_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_dtype", DTYPES, ids=str)
def test_the_kernels_run_for_a_few_tokens(
    operators: Any,
    launched: list[str],
    device: torch.device,
    tokens: int,
    model_dtype: torch.dtype,
    factor_dtype: torch.dtype,
) -> None:
    x, output = (torch.randn(tokens, width).to(device, model_dtype) for width in (40, 24))
    right, left = (torch.randn(*shape).to(device, factor_dtype) for shape in ((5, 40), (24, 5)))
    check(operators, x, right, output, left)
    assert launched == ["right", "left_add_"]


@pytest.mark.parametrize("shape", [(), (16,), (2, 3), (1, 1), (4, 2, 2)])
def test_any_leading_shape_and_strides(
    operators: Any, launched: list[str], device: torch.device, shape: tuple[int, ...]
) -> None:
    x, output = (scattered(torch.randn(*shape, width, device=device)) for width in (40, 24))
    check(operators, x, torch.randn(5, 40, device=device), output, torch.randn(24, 5, device=device))
    assert launched == ["right", "left_add_"]
    whole = output._base
    assert whole.isnan().sum() == whole.numel() - output.numel()


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens(operators: Any, launched: list[str], device: torch.device, shape: tuple[int, ...]) -> None:
    x, output = torch.randn(*shape, 40, device=device), torch.randn(*shape, 24, device=device)
    check(operators, x, torch.randn(5, 40, device=device), output, torch.randn(24, 5, device=device))


@pytest.mark.parametrize("shape", [(17,), (9, 2)])
def test_products_of_torch_for_more_tokens(
    operators: Any, launched: list[str], device: torch.device, shape: tuple[int, ...]
) -> None:
    x, output = torch.randn(*shape, 40, device=device), torch.randn(*shape, 24, device=device)
    check(operators, x, torch.randn(5, 40, device=device), output, torch.randn(24, 5, device=device))
    assert not launched


@pytest.mark.parametrize("wide", ["model", "factors", "all"])
def test_products_of_torch_for_float64(operators: Any, launched: list[str], device: torch.device, wide: str) -> None:
    model, factors = (torch.float64 if wide in (part, "all") else torch.float32 for part in ("model", "factors"))
    x, output = (torch.randn(3, width).to(device, model) for width in (40, 24))
    right, left = (torch.randn(*shape).to(device, factors) for shape in ((5, 40), (24, 5)))
    found = operators.products.right_on_gpu(x, right)
    torch.testing.assert_close(found.double(), x.double() @ right.double().T, rtol=1e-5, atol=1e-5)
    expected = output.double() + found.double() @ left.double().T
    operators.products.left_add_on_gpu(output, found, left)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    assert not launched


@pytest.mark.parametrize("tokens", [3, 20])
def test_the_version_counter_moves(operators: Any, launched: list[str], device: torch.device, tokens: int) -> None:
    output = torch.zeros(tokens, 24, device=device)
    before = output._version
    operators.products.left_add_on_gpu(output, torch.ones(tokens, 5, device=device), torch.ones(24, 5, device=device))
    assert output._version > before
