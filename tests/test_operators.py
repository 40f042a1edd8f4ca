"""The operators of a correction: torch's own checks, a float64 oracle, writes in place, gradients, and memory."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glowq import operators

KERNELS = Path(__file__).parents[1] / "kernels" / "torch-ext"
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
SHAPES = [(), (3,), (2, 3), (17,), (0,), (2, 0)]
WIDTHS = (6, 4, 5)


def draw(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def lefts_of(widths: Sequence[int], rank: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
    return [draw(width, rank, dtype=dtype, grad=grad) for width in widths]


def added(x: Tensor, right: Tensor, lefts: Sequence[Tensor]) -> Tensor:
    """x B^T A^T in float64, the members side by side."""
    product = x.detach().double() @ right.detach().double().T
    return torch.cat([product @ left.detach().double().T for left in lefts], -1)


def assert_close(found: Tensor, expected: Tensor, *parts: Tensor) -> None:
    """Off by no more than the roundings on the way, each at most a unit of its dtype in the sum of absolute terms.

    Args:
        parts: what was multiplied, in order: every input and every product in between is rounded once to the factors'
            dtype, the last of `parts`, and added up in float32 or better.
    """
    first, *factors = (part.detach().double().abs() for part in parts)
    terms = sum(factor.shape[1] for factor in factors)
    for factor in factors:
        first = first @ factor.T
    unit = 4 * torch.finfo(parts[-1].dtype).eps + terms * torch.finfo(torch.float32).eps
    bound = unit * (first + expected.abs()) + torch.finfo(found.dtype).eps * expected.abs()
    assert found.shape == expected.shape
    assert ((found.detach().double() - expected).abs() <= bound).all()


modes = pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=["grad", "no_grad", "inference"]
)


class TestTorchsChecks:
    """`opcheck`: the schema tells what is written, fake tensors have the right shapes, and gradients can be traced."""

    @pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
    def check(self, request: pytest.FixtureRequest) -> Callable[..., None]:
        # The traced graph and eager take other paths with other roundings: a few units of the largest entries.
        near = {"rtol": 8 * torch.finfo(request.param).eps, "atol": 64 * torch.finfo(request.param).eps}

        def run(operator: Any, *arguments: Any) -> None:
            found = torch.library.opcheck(operator, arguments, **near)
            assert set(found.values()) == {"SUCCESS"}

        run.dtype = request.param  # type: ignore[attr-defined]
        return run

    @pytest.mark.parametrize("grad", [False, True])
    def test_right(self, check: Any, grad: bool) -> None:
        x, factor = draw(2, 3, 8, dtype=check.dtype, grad=grad), draw(5, 8, dtype=check.dtype, grad=grad)
        check(torch.ops.glowq.right.default, x, factor)
        check(torch.ops.glowq.right.default, x.transpose(0, 1), factor)

    @pytest.mark.parametrize("grad", [False, True])
    @pytest.mark.parametrize("widths", [(6,), WIDTHS])
    @pytest.mark.parametrize("in_one_piece", [False, True])
    def test_correction(self, check: Any, grad: bool, widths: tuple[int, ...], in_one_piece: bool) -> None:
        x, factor = draw(2, 3, 8, dtype=check.dtype, grad=grad), draw(5, 8, dtype=check.dtype, grad=grad)
        lefts = lefts_of(widths, 5, check.dtype)
        if in_one_piece:
            lefts = operators.stacked(lefts)
        lefts = [left.detach().requires_grad_(grad) for left in lefts]
        check(torch.ops.glowq.correction.default, x, factor, lefts)

    @pytest.mark.parametrize("grad", ["none", "output", "factors", "all"])
    def test_left_add(self, check: Any, grad: str) -> None:
        output = draw(2, 3, 6, dtype=check.dtype, grad=grad in ("output", "all"))
        product = draw(2, 3, 5, dtype=check.dtype, grad=grad in ("factors", "all"))
        left = draw(6, 5, dtype=check.dtype, grad=grad in ("factors", "all"))
        # A leaf that wants a gradient is written to by nobody.
        check(torch.ops.glowq.left_add_.default, output.clone() if output.requires_grad else output, product, left)


class TestValues:
    @modes
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("rank", [1, 5, 32])
    @pytest.mark.parametrize("factor_dtype", DTYPES, ids=str)
    def test_right_and_correction(self, mode: Any, shape: tuple[int, ...], rank: int, factor_dtype: Any) -> None:
        with mode():
            factor, lefts = draw(rank, 24, dtype=factor_dtype), lefts_of(WIDTHS, rank, factor_dtype)
            for x_dtype in DTYPES:
                x = draw(*shape, 24, dtype=x_dtype)
                product = operators.right(x, factor)
                assert product.dtype == factor_dtype
                assert_close(product, x.double() @ factor.double().T, x, factor)
                for members in (lefts, lefts[:1], operators.stacked(lefts)):
                    found = operators.correction(x, factor, members)
                    assert found.dtype == factor_dtype
                    assert_close(found, added(x, factor, members), x, factor, torch.cat(members))

    @modes
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("rank", [1, 5, 32])
    @pytest.mark.parametrize("factor_dtype", DTYPES, ids=str)
    def test_left_add(self, mode: Any, shape: tuple[int, ...], rank: int, factor_dtype: Any) -> None:
        with mode():
            product, left = draw(*shape, rank, dtype=factor_dtype), draw(6, rank, dtype=factor_dtype)
            for output_dtype in DTYPES:
                output = draw(*shape, 6, dtype=output_dtype)
                expected = output.double() + product.double() @ left.double().T
                operators.left_add_(output, product, left)
                assert output.dtype == output_dtype
                assert_close(output, expected, product, left)

    @modes
    def test_an_input_of_any_strides(self, mode: Any) -> None:
        factor, lefts = draw(5, 8), lefts_of(WIDTHS, 5)
        with mode():
            for x in (draw(3, 2, 8).transpose(0, 1), draw(8, 3).T, draw(3, 16)[:, ::2], draw(1, 8).expand(3, 8)):
                assert_close(operators.right(x, factor), x.double() @ factor.double().T, x, factor)
                found = operators.correction(x, factor, operators.stacked(lefts))
                assert_close(found, added(x, factor, lefts), x, factor, torch.cat(lefts))

    @modes
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("tokens", [1, 3, 20])
    def test_a_slice_of_an_output_is_written_and_nothing_beside_it(self, mode: Any, dtype: Any, tokens: int) -> None:
        with mode():
            whole = torch.full((tokens + 2, 10), torch.nan, dtype=dtype)
            output = whole[1:-1, 2:8]
            output.copy_(torch.randn(tokens, 6))
            product, left = draw(tokens, 5), draw(6, 5)
            expected = output.double() + product.double() @ left.double().T
            operators.left_add_(output, product, left)
            assert_close(output, expected, product, left)
            assert whole.isnan().sum() == whole.numel() - output.numel()
            assert not output.isnan().any()

    def test_a_parameter_and_a_batched_tensor_are_inputs_like_others(self) -> None:
        factor, lefts, x = draw(5, 8), lefts_of(WIDTHS, 5), draw(4, 3, 8)
        for mode in (torch.enable_grad, torch.no_grad):
            with mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # vmap's, of operators that it runs in a loop
                found = operators.correction(torch.nn.Parameter(x), factor, lefts)
                assert_close(found, added(x, factor, lefts), x, factor, torch.cat(lefts))
                mapped = torch.func.vmap(lambda row: operators.correction(row, factor, lefts))(x)
                torch.testing.assert_close(mapped, found)


class TestWritingInPlace:
    @modes
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("sliced", [False, True])
    def test_the_same_memory_and_nothing_returned(self, mode: Any, dtype: torch.dtype, sliced: bool) -> None:
        with mode():
            output = torch.zeros(3, 9, dtype=dtype)[:, :6] if sliced else torch.zeros(3, 6, dtype=dtype)
            place = output.data_ptr()
            assert operators.left_add_(output, torch.ones(3, 2), torch.ones(6, 2)) is None
            assert output.data_ptr() == place
            assert (output == 2).all()

    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad], ids=["grad", "no_grad"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("grad", [False, True])
    def test_the_version_counter_moves(self, mode: Any, dtype: torch.dtype, grad: bool) -> None:
        output, whole = torch.zeros(3, 6, dtype=dtype), torch.zeros(3, 9, dtype=dtype)
        left = torch.ones(6, 2, requires_grad=grad)
        with mode():
            for written in (output, whole[:, :6]):
                before = written._version
                operators.left_add_(written, torch.ones(3, 2), left)
                assert written._version > before

    def test_an_output_that_a_gradient_needs_is_noticed(self) -> None:
        x = draw(3, 6, grad=True)
        output = x.exp()  # whose backward reads its result
        operators.left_add_(output, draw(3, 2), draw(6, 2))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def float64(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def right_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    return operators.right, [float64(2, 4), float64(3, 4)]


def correction_case(*widths: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    lefts = [float64(width, 3) for width in widths]
    return lambda x, right, *lefts: operators.correction(x, right, lefts), [float64(2, 4), float64(3, 4), *lefts]


def left_add_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    def add(output: Tensor, product: Tensor, left: Tensor) -> Tensor:
        written = output.clone()
        operators.left_add_(written, product, left)
        return written

    return add, [float64(2, 5), float64(2, 3), float64(5, 3)]


class TestGradients:
    @pytest.mark.parametrize(
        "case",
        [right_case, lambda: correction_case(4), lambda: correction_case(2, 3, 1), left_add_case],
        ids=["right", "correction of one", "correction of three", "left_add_"],
    )
    def test_first_and_second_order(self, case: Callable[[], Any]) -> None:
        function, inputs = case()
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
        for wanted in range(len(inputs)):
            only = [entry.detach().requires_grad_(place == wanted) for place, entry in enumerate(inputs)]
            assert torch.autograd.gradcheck(function, only)

    @pytest.mark.parametrize(
        "case",
        [right_case, lambda: correction_case(2, 3, 1), left_add_case],
        ids=["right", "correction", "left_add_"],
    )
    def test_forward_mode(self, case: Callable[[], Any]) -> None:
        """Nothing requires a gradient there, and yet a derivative is wanted."""
        function, inputs = case()
        inputs = [entry.detach() for entry in inputs]
        directions = [torch.randn_like(entry) for entry in inputs]
        _, found = torch.func.jvp(function, tuple(inputs), tuple(directions))
        step = 1e-6
        ahead, behind = (
            function(*(entry + sign * step * way for entry, way in zip(inputs, directions, strict=True)))
            for sign in (1, -1)
        )
        torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)

    def test_stacked_factors_get_a_gradient_each(self) -> None:
        lefts = [left.detach().requires_grad_() for left in operators.stacked(lefts_of(WIDTHS, 3))]
        x, right = draw(2, 4), draw(3, 4)
        operators.correction(x, right, lefts).sum().backward()
        product = (x.double() @ right.double().T).sum(0)
        for left in lefts:
            torch.testing.assert_close(left.grad.double(), product.expand(len(left), 3), rtol=1e-5, atol=1e-5)


def apart_in_one_buffer(spans: Sequence[tuple[int, int]], rank: int) -> list[Tensor]:
    """Factors over one stretch of memory, a storage each: (first row, rows) of every one."""
    memory = bytearray(torch.randn(32, rank).numpy().tobytes())
    return [
        torch.frombuffer(memory, dtype=torch.float32, count=rows * rank, offset=4 * rank * start).view(rows, rank)
        for start, rows in spans
    ]


class TestStacked:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_same_values_in_one_piece_of_memory(self, dtype: torch.dtype) -> None:
        lefts = lefts_of(WIDTHS, 5, dtype)
        pieces = operators.stacked(lefts)
        place = pieces[0].data_ptr()
        for left, piece in zip(lefts, pieces, strict=True):
            assert torch.equal(left, piece)
            assert piece.is_contiguous()
            assert piece.data_ptr() == place
            place += piece.numel() * piece.element_size()
        assert len({piece.untyped_storage().data_ptr() for piece in pieces}) == 1

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_one_product_gives_what_several_give(self, dtype: torch.dtype) -> None:
        x, right, lefts = draw(3, 24, dtype=dtype), draw(5, 24, dtype=dtype), lefts_of(WIDTHS, 5, dtype)
        with torch.no_grad():
            apart = operators.correction(x, right, lefts)
            together = operators.correction(x, right, operators.stacked(lefts))
        torch.testing.assert_close(together, apart)

    @pytest.mark.parametrize(
        "spans",
        [
            [(0, 6), (6, 4)],  # neighbours
            [(0, 6), (6, 4), (10, 5)],
            [(10, 6), (6, 4), (0, 6)],  # in the wrong order
            [(0, 6), (8, 4)],  # a gap
            [(0, 6), (4, 4)],  # some rows in both
            [(0, 6), (0, 6)],  # the same twice
        ],
    )
    def test_factors_of_several_storages_wherever_they_lie(self, spans: list[tuple[int, int]]) -> None:
        lefts = apart_in_one_buffer(spans, 5)
        x, right = draw(3, 8), draw(5, 8)
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                found = operators.correction(x, right, lefts)
            assert_close(found, added(x, right, lefts), x, right, torch.cat(lefts))

    @pytest.mark.parametrize(
        "pick",
        [
            lambda whole: [whole[4:8], whole[:4]],
            lambda whole: [whole[:4], whole[6:10]],
            lambda whole: [whole[:4], whole[2:6]],
            lambda whole: [whole[:6], whole[6:]],
            lambda whole: [whole[:6:2], whole[6:]],
            lambda whole: [whole.T.contiguous().T[:6], whole[6:]],
            lambda whole: [whole.expand(2, 12, 5)[0], whole[:0], whole[:3]],
        ],
        ids=["swapped", "gap", "overlap", "halves", "every other row", "transposed", "an empty one"],
    )
    def test_slices_of_one_storage_wherever_they_lie(self, pick: Callable[[Tensor], list[Tensor]]) -> None:
        lefts = pick(draw(12, 5))
        x, right = draw(3, 8), draw(5, 8)
        with torch.no_grad():
            found = operators.correction(x, right, lefts)
        assert_close(found, added(x, right, lefts), x, right, torch.cat(lefts))


class TestOnGPUsWithoutKernels:
    """What runs on a GPU whose kernels cannot run: torch's products, and one warning that says so."""

    @pytest.fixture
    def reason(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        try:
            import glowq_kernels
        except ImportError:  # installed before the kernels were part of the distribution
            monkeypatch.syspath_prepend(KERNELS)
            import glowq_kernels
        if glowq_kernels.unavailable() is None:  # on a GPU, or in triton's interpreter
            monkeypatch.setattr(sys.modules["glowq_kernels"], "unavailable", lambda: "the kernels are out of reach.")
        operators._kernels.cache_clear()
        yield glowq_kernels.unavailable()
        operators._kernels.cache_clear()

    def test_right_values_and_one_warning(self, reason: str) -> None:
        with torch.no_grad(), pytest.warns(UserWarning) as seen:
            for tokens in (1, 3, 16, 17, 0):
                for dtype in DTYPES:
                    x, right, left = draw(tokens, 8), draw(5, 8, dtype=dtype), draw(6, 5, dtype=dtype)
                    product = operators._right_on_gpu(x, right)
                    assert product.dtype == dtype
                    assert_close(product, x.double() @ right.double().T, x, right)
                    output = draw(tokens, 6)
                    expected = output.double() + product.double() @ left.double().T
                    assert operators._left_add_on_gpu(output, product, left) is None
                    assert_close(output, expected, product, left)
        (warning,) = seen
        assert reason in str(warning.message)
        assert "pip install 'glowq[triton]'" in str(warning.message)

    def test_nothing_is_said_where_no_kernel_is_wanted(self, reason: str) -> None:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            x, right = draw(17, 8), draw(5, 8)
            assert_close(operators._right_on_gpu(x, right), x.double() @ right.double().T, x, right)
            x, right = x[:1].double(), right.double()
            torch.testing.assert_close(operators._right_on_gpu(x, right), x @ right.T)
