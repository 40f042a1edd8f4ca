"""Every form of the root of an output moment, and the solver's result with it, compared with the dense moment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glowq.errors import NonFiniteError
from glowq.solving.low_rank import factorize
from glowq.solving.moments import LowRankMoment
from glowq.solving.output_root import OutputRoot

WIDTH, DAMPING, UNIT = 50, 0.1, 0.125


def moment(kind: str) -> tuple[Tensor | LowRankMoment, Tensor]:
    """Return a moment and its dense matrix."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(WIDTH, 7, generator=generator, dtype=torch.float64) * torch.logspace(3, -3, 7).double()
    diagonal = torch.rand(WIDTH, generator=generator, dtype=torch.float64)
    diagonal[:5] = 0
    if kind == "no direction":
        factor = factor * 0
    whole = diagonal.diag() + factor @ factor.T
    if kind == "full":
        return whole, whole
    if kind == "diagonal":
        return diagonal, diagonal.diag()
    return LowRankMoment(diagonal, factor), whole


@pytest.mark.parametrize("kind", ["full", "diagonal", "low rank", "no direction"])
def test_the_root_squared_is_the_damped_moment(kind: str) -> None:
    given, whole = moment(kind)
    root, identity = OutputRoot.of(given, UNIT, DAMPING), torch.eye(WIDTH, dtype=torch.float64)
    expected = UNIT * (whole + DAMPING * whole.diagonal().mean() * identity)
    lower, upper = root.apply(identity), root.apply_transposed(identity)
    scale = float(expected.abs().max())
    torch.testing.assert_close(lower @ lower.T, expected, rtol=1e-9, atol=1e-12 * scale)
    torch.testing.assert_close(upper, lower.T, rtol=1e-12, atol=1e-12 * scale**0.5)
    single = root.to(torch.float32)
    torch.testing.assert_close(single.apply(identity.float()).double(), lower, rtol=1e-4, atol=1e-5 * scale**0.5)


def test_no_moment_is_the_identity() -> None:
    block = torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(0))
    root = OutputRoot()
    for found in (root.apply(block), root.apply_transposed(block)):
        assert torch.equal(found, block)


@pytest.mark.parametrize("route", ["moment", "energy"])
@pytest.mark.parametrize("scale", [1e-6, 1.0])
@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(30, 44, 6), (44, 30, 6), (300, 240, 16), (260, 400, 16)])
def test_the_solver_finds_what_it_finds_by_the_matrix(
    outputs: int, inputs: int, rank: int, scale: float, route: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(outputs, 9, generator=generator) * torch.logspace(1, -2, 9) * scale
    diagonal = torch.rand(outputs, generator=generator) * scale**2
    whole = diagonal.double().diag() + factor.double() @ factor.double().T
    error = torch.randn(outputs, inputs, generator=generator) * torch.rand(inputs, generator=generator)
    x = torch.randn(500, inputs, generator=generator, dtype=torch.float64)
    inner = x.T @ x / 500
    energy = None if route == "moment" else error.double() @ inner @ error.double().T
    found, expected = (
        factorize(error, inner if energy is None else None, rank, energy=energy, output_moment=output)
        for output in (LowRankMoment(diagonal, factor), whole)
    )
    # Krylov iteration stops within a thousandth of the optimum. A dense solve is exact.
    rtol = 1e-5 if min(outputs, inputs) < 192 else 1e-3
    torch.testing.assert_close(found.gains, expected.gains, rtol=rtol, atol=0.0)
    assert found.total == pytest.approx(expected.total, rel=1e-2)
    damped = whole + 0.1 * whole.diagonal().mean() * torch.eye(outputs, dtype=torch.float64)
    outside, inside = torch.linalg.cholesky(damped).T, torch.linalg.cholesky(inner)
    products = [outside @ factors.left.double() @ factors.right.double() @ inside for factors in (found, expected)]
    assert float((products[0] - products[1]).norm()) <= 1e-2 * float(products[1].norm())


@pytest.mark.parametrize("part", ["diagonal", "factor"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_low_rank_moment_that_is_not_finite_is_named(part: str, value: float) -> None:
    tensors = {"diagonal": torch.ones(6), "factor": torch.ones(6, 2)}
    tensors[part][1] = value
    with pytest.raises(NonFiniteError, match=r"^output_moment \(6,\) must be finite; found NaN or Inf"):
        factorize(torch.ones(6, 5), None, 2, output_moment=LowRankMoment(**tensors))
