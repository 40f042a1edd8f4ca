"""The operators of a correction: torch's checks, values compared with float64, in-place writes, gradients, memory."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glowq.runtime import operators, products

KERNELS = Path(__file__).parents[2] / "kernels" / "torch-ext"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(), (3,), (2, 3), (17,), (0,), (2, 0)]
WIDTHS = (6, 4, 5)


def draw(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def lefts_of(rank: int, dtype: torch.dtype = torch.float32, widths: Sequence[int] = WIDTHS) -> list[Tensor]:
    return [draw(width, rank, dtype=dtype) for width in widths]


def added(x: Tensor, right: Tensor, left: Tensor) -> Tensor:
    """Compute x B^T A^T in float64."""
    return x.detach().double() @ right.detach().double().T @ left.detach().double().T


def assert_close(found: Tensor, expected: Tensor, *parts: Tensor) -> None:
    """Assert that the error is within the bound of the roundings of the computation.

    Args:
        found: computed result.
        expected: exact result, float64.
        parts: the tensors that were multiplied, in order. Every input and every intermediate product is rounded once to
            the dtype of the factors (the last of `parts`), and sums are computed in float32 or better.
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
# On the CPU the functions bypass torch's dispatcher; on other devices and in compilers they use it.
both_ops = pytest.mark.parametrize("ops", [operators, torch.ops.glowq], ids=["function", "dispatcher"])


class TestTorchsChecks:
    """`opcheck`: the schema names the written arguments, fake tensors have correct shapes, gradients can be traced."""

    @pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
    def check(self, request: pytest.FixtureRequest) -> Callable[..., None]:
        # The traced graph and eager round differently, by a few units of the largest entries.
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
    def test_correction(self, check: Any, grad: bool) -> None:
        x, factor = draw(2, 3, 8, dtype=check.dtype, grad=grad), draw(5, 8, dtype=check.dtype, grad=grad)
        left = draw(sum(WIDTHS), 5, dtype=check.dtype, grad=grad)
        check(torch.ops.glowq.correction.default, x, factor, left)

    @pytest.mark.parametrize("grad", ["none", "output", "factors", "all"])
    def test_left_add(self, check: Any, grad: str) -> None:
        output = draw(2, 3, 6, dtype=check.dtype, grad=grad in ("output", "all"))
        product = draw(2, 3, 5, dtype=check.dtype, grad=grad in ("factors", "all"))
        left = draw(6, 5, dtype=check.dtype, grad=grad in ("factors", "all"))
        # A leaf tensor that requires a gradient must not be written in place.
        check(torch.ops.glowq.left_add_.default, output.clone() if output.requires_grad else output, product, left)


class TestValues:
    @both_ops
    @modes
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("rank", [1, 5, 32])
    def test_right_and_correction(self, ops: Any, mode: Any, shape: tuple[int, ...], rank: int) -> None:
        for x_dtype, dtype in itertools.product(DTYPES, repeat=2):
            with mode():
                x, factor, left = (
                    draw(*shape, 24, dtype=x_dtype),
                    draw(rank, 24, dtype=dtype),
                    draw(15, rank, dtype=dtype),
                )
                found = ops.right(x, factor)
                assert found.dtype == dtype
                assert_close(found, x.double() @ factor.double().T, x, factor)
                found = ops.correction(x, factor, left)
                assert found.dtype == dtype
                assert_close(found, added(x, factor, left), x, factor, left)

    @both_ops
    @modes
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("rank", [1, 5, 32])
    def test_left_add(self, ops: Any, mode: Any, shape: tuple[int, ...], rank: int) -> None:
        for output_dtype, dtype in itertools.product(DTYPES, repeat=2):
            with mode():
                output = draw(*shape, 6, dtype=output_dtype)
                product, left = draw(*shape, rank, dtype=dtype), draw(6, rank, dtype=dtype)
                expected = output.double() + product.double() @ left.double().T
                ops.left_add_(output, product, left)
                assert output.dtype == output_dtype
                assert_close(output, expected, product, left)

    @modes
    def test_an_input_of_any_strides(self, mode: Any) -> None:
        factor, left = draw(5, 8), draw(15, 5)
        with mode():
            for x in (draw(3, 2, 8).transpose(0, 1), draw(8, 3).T, draw(3, 16)[:, ::2], draw(1, 8).expand(3, 8)):
                assert_close(operators.right(x, factor), x.double() @ factor.double().T, x, factor)
                assert_close(operators.correction(x, factor, left), added(x, factor, left), x, factor, left)

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

    @modes
    def test_an_output_of_any_strides(self, mode: Any) -> None:
        with mode():
            for output in (draw(3, 2, 6).transpose(0, 1), draw(6, 3).T, draw(3, 12)[:, ::2]):
                product, left = draw(*output.shape[:-1], 5), draw(6, 5)
                expected = output.double() + product.double() @ left.double().T
                operators.left_add_(output, product, left)
                assert_close(output, expected, product, left)


def packed(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return an int8 factor and one scale per row; the scales are powers of two, which are exact in every dtype."""
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8), torch.exp2(
        torch.randint(-9, -5, (rows,)).float()
    )


class TestInt8:
    """Products with int8 rows and their scales equal products with the dense matrix, for every product of torch."""

    @both_ops
    @modes
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize(("rank", "channels"), [(1, 24), (16, 32), (5, 48), (32, 20)])
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
    def test_products(
        self, ops: Any, mode: Any, shape: tuple[int, ...], rank: int, channels: int, dtype: torch.dtype
    ) -> None:
        x, (right, scale), (left, left_scale) = (
            draw(*shape, channels, dtype=dtype),
            packed(rank, channels),
            packed(15, rank),
        )
        dense, dense_left = right * scale.to(dtype)[:, None], left * left_scale.to(dtype)[:, None]
        for scales in ((scale, left_scale), (scale.to(dtype), left_scale.to(dtype))):
            with mode():
                found, both = ops.right(x, right, scales[0]), ops.correction(x, right, left, *scales)
            assert found.dtype == both.dtype == dtype
            assert_close(found, x.double() @ dense.double().T, x, dense)
            assert_close(both, added(x, dense, dense_left), x, dense, dense_left)

    @both_ops
    @modes
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("rank", [1, 16, 20])
    def test_left_add(self, ops: Any, mode: Any, shape: tuple[int, ...], rank: int) -> None:
        left, scale = packed(6, rank)
        for output_dtype, dtype in itertools.product(DTYPES, repeat=2):
            dense = left * scale.to(dtype)[:, None]
            with mode():
                output, product = draw(*shape, 6, dtype=output_dtype), draw(*shape, rank, dtype=dtype)
                expected = output.double() + product.double() @ dense.double().T
                ops.left_add_(output, product, left, scale)
                assert output.dtype == output_dtype
                assert_close(output, expected, product, dense)

    @both_ops
    def test_gradients_of_the_input(self, ops: Any) -> None:
        (right, scale), (left, left_scale) = packed(3, 4), packed(6, 3)
        assert torch.autograd.gradcheck(lambda x: ops.right(x, right, scale), float64(2, 4))
        assert torch.autograd.gradcheck(lambda x: ops.correction(x, right, left, scale, left_scale), float64(2, 4))

    def test_inputs_of_any_strides(self) -> None:
        (right, scale), transposed = packed(16, 32), packed(32, 16)
        for x in (draw(32, 3).T, draw(3, 64)[:, ::2], draw(1, 32).expand(3, 32), draw(3, 2, 32).transpose(0, 1)):
            for rows, factor in ((scale, right), (torch.ones(16), transposed[0].T)):
                x, dense = x.bfloat16(), factor * rows[:, None]
                with torch.no_grad():
                    assert_close(operators.right(x, factor, rows), x.double() @ dense.double().T, x, dense.bfloat16())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("grad", [False, True])
    def test_torchs_own_checks(self, dtype: torch.dtype, grad: bool) -> None:
        x, (right, scale), (left, left_scale) = draw(3, 16, dtype=dtype, grad=grad), packed(16, 16), packed(6, 16)
        near = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 64 * torch.finfo(dtype).eps}
        output, product = draw(3, 6, dtype=dtype), draw(3, 16, dtype=dtype)
        for operator, arguments in (
            (torch.ops.glowq.right.default, (x, right, scale)),
            (torch.ops.glowq.correction.default, (x, right, left, scale, left_scale)),
            (torch.ops.glowq.left_add_.default, (output, product, left, left_scale)),
        ):
            assert set(torch.library.opcheck(operator, arguments, **near).values()) == {"SUCCESS"}


class TestWritingInPlace:
    @both_ops
    @modes
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("sliced", [False, True])
    def test_the_same_memory_and_nothing_returned(self, ops: Any, mode: Any, dtype: torch.dtype, sliced: bool) -> None:
        with mode():
            output = torch.zeros(3, 9, dtype=dtype)[:, :6] if sliced else torch.zeros(3, 6, dtype=dtype)
            place = output.data_ptr()
            assert ops.left_add_(output, torch.ones(3, 2), torch.ones(6, 2)) is None
            assert output.data_ptr() == place
            assert (output == 2).all()

    @both_ops
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad], ids=["grad", "no_grad"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("grad", [False, True])
    def test_the_version_counter_moves(self, ops: Any, mode: Any, dtype: torch.dtype, grad: bool) -> None:
        output, whole = torch.zeros(3, 6, dtype=dtype), torch.zeros(3, 9, dtype=dtype)
        left = torch.ones(6, 2, requires_grad=grad)
        with mode():
            for written in (output, whole[:, :6]):
                before = written._version
                ops.left_add_(written, torch.ones(3, 2), left)
                assert written._version > before

    def test_an_output_that_a_gradient_needs_is_noticed(self) -> None:
        x = draw(3, 6, grad=True)
        output = x.exp()  # the backward of exp needs its result
        operators.left_add_(output, draw(3, 2), draw(6, 2))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def float64(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def right_case(ops: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    return ops.right, [float64(2, 4), float64(3, 4)]


def correction_case(ops: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    return ops.correction, [float64(2, 4), float64(3, 4), float64(6, 3)]


def left_add_case(ops: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    def add(output: Tensor, product: Tensor, left: Tensor) -> Tensor:
        written = output.clone()
        ops.left_add_(written, product, left)
        return written

    return add, [float64(2, 5), float64(2, 3), float64(5, 3)]


@both_ops
@pytest.mark.parametrize(
    "case",
    [right_case, correction_case, left_add_case],
    ids=["right", "correction", "left_add_"],
)
class TestGradients:
    def test_first_and_second_order(self, ops: Any, case: Callable[[Any], Any]) -> None:
        function, inputs = case(ops)
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
        for wanted in range(len(inputs)):
            only = [entry.detach().requires_grad_(place == wanted) for place, entry in enumerate(inputs)]
            assert torch.autograd.gradcheck(function, only)

    def test_forward_mode(self, ops: Any, case: Callable[[Any], Any]) -> None:
        """In forward mode no input requires a gradient, but the operators must give a derivative."""
        function, inputs = case(ops)
        inputs = [entry.detach() for entry in inputs]
        directions = [torch.randn_like(entry) for entry in inputs]
        _, found = torch.func.jvp(function, tuple(inputs), tuple(directions))
        step = 1e-6
        ahead, behind = (
            function(*(entry + sign * step * way for entry, way in zip(inputs, directions, strict=True)))
            for sign in (1, -1)
        )
        torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


def buffers(*spans: tuple[int, int]) -> list[Tensor]:
    """Return factors in one memory buffer, each with its own storage, from (first row, number of rows) of each."""
    memory = bytearray(torch.randn(32, 5).numpy().tobytes())
    return [
        torch.frombuffer(memory, dtype=torch.float32, count=5 * rows, offset=20 * first).view(rows, 5)
        for first, rows in spans
    ]


class TestStacked:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_same_values_in_one_piece_of_memory(self, dtype: torch.dtype) -> None:
        lefts = lefts_of(5, dtype)
        pieces = operators.stacked(lefts)
        place = pieces[0].data_ptr()
        for left, piece in zip(lefts, pieces, strict=True):
            assert torch.equal(left, piece)
            assert piece.is_contiguous()
            assert piece.data_ptr() == place
            place += piece.numel() * piece.element_size()
        assert len({piece.untyped_storage().data_ptr() for piece in pieces}) == 1

    @pytest.mark.parametrize(
        ("place", "is_whole"),
        [
            pytest.param(lambda: buffers((0, 6), (6, 4), (10, 5)), False, id="neighbours by chance"),
            pytest.param(lambda: buffers((10, 6), (6, 4), (0, 6)), False, id="storages in the wrong order"),
            pytest.param(lambda: buffers((0, 6), (8, 4)), False, id="storages with a gap"),
            pytest.param(lambda: buffers((0, 6), (4, 4)), False, id="storages that overlap"),
            pytest.param(lambda: list(draw(12, 5).split([4, 8])), True, id="one piece"),
            pytest.param(lambda: list(draw(12, 5).split([4, 8]))[::-1], False, id="in the wrong order"),
            pytest.param(lambda: list(draw(12, 5).split([4, 2, 6]))[::2], False, id="with a gap"),
            pytest.param(lambda: (lambda whole: [whole[:4], whole[2:6]])(draw(12, 5)), False, id="that overlap"),
            pytest.param(lambda: (lambda whole: [whole[:6:2], whole[6:]])(draw(12, 5)), False, id="every other row"),
            pytest.param(lambda: list(draw(5, 12).T.split([4, 8])), False, id="transposed"),
            pytest.param(lambda: list(draw(12, 5).split([4, 0, 8])), False, id="one of no rows"),
        ],
    )
    def test_only_what_lies_in_one_piece_is_joined(self, place: Callable[[], list[Tensor]], is_whole: bool) -> None:
        factors = place()
        whole = operators.joined(factors)
        assert (whole is not None) is is_whole
        if whole is not None:
            assert torch.equal(whole, torch.cat(factors))
            assert whole.data_ptr() == factors[0].data_ptr()


class TestOnGPUsWithoutKernels:
    """On a GPU on which the kernels cannot run, torch's products run, and one warning says so."""

    @pytest.fixture
    def reason(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        try:
            import glowq_kernels
        except ImportError:  # an older installation, without the kernels
            monkeypatch.syspath_prepend(KERNELS)
            import glowq_kernels
        if glowq_kernels.unavailable() is None:  # the kernels can run, on a GPU or in triton's interpreter
            monkeypatch.setattr(sys.modules["glowq_kernels"], "unavailable", lambda: "the kernels are out of reach.")
        products.kernels.cache_clear()
        yield glowq_kernels.unavailable()
        products.kernels.cache_clear()

    def test_right_values_and_one_warning(self, reason: str) -> None:
        with torch.no_grad(), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for tokens in (1, 3, 16, 17, 0):
                for dtype in DTYPES:
                    x, right, left = draw(tokens, 8), draw(5, 8, dtype=dtype), draw(6, 5, dtype=dtype)
                    product = products.right_on_gpu(x, right)
                    assert product.dtype == dtype
                    assert_close(product, x.double() @ right.double().T, x, right)
                    output = draw(tokens, 6)
                    expected = output.double() + product.double() @ left.double().T
                    assert products.left_add_on_gpu(output, product, left) is None
                    assert_close(output, expected, product, left)
        (warning,) = (str(entry.message) for entry in seen if issubclass(entry.category, UserWarning))
        assert reason in warning
        assert "pip install 'glowq[triton]'" in warning

    def test_nothing_is_said_where_no_kernel_is_wanted(self, reason: str) -> None:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            x, right = draw(17, 8), draw(5, 8)
            assert_close(products.right_on_gpu(x, right), x.double() @ right.double().T, x, right)
            x, right = x[:1].double(), right.double()
            torch.testing.assert_close(products.right_on_gpu(x, right), x @ right.T)
