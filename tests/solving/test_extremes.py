"""The solver at the ends of the number ranges, and over many seeds, against dense float64 linear algebra."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from glowq.calibration.gradient_sums import GradientSketch
from glowq.solving.low_rank import Factors, factorize
from glowq.solving.moments import LowRankMoment
from support.oracle import Case, bound, case

# Dense, Krylov, and Krylov with fewer outputs than inputs.
SHAPES = [(40, 32, 6), (400, 256, 16), pytest.param(256, 700, 24, marks=pytest.mark.long)]
SEEDS = [pytest.param(12), pytest.param(200, marks=pytest.mark.long)]


def solved(given: Case, rank: int, route: str, **options: Any) -> Factors:
    if route == "energy":
        return factorize(given.error, None, rank, energy=given.energy, **options)
    return factorize(given.error, given.moment, rank, **options)


def check(given: Case, rank: int, factors: Factors) -> None:
    values = given.values()
    total, least = float(values.sum()), float(values[rank:].sum())
    rest = given.rest(factors)
    assert bool(torch.isfinite(factors.left).all() and torch.isfinite(factors.right).all())
    assert float(rest.sum()) <= 1.001 * least + 1e-11 * total
    assert factors.total == pytest.approx(total, rel=0.05)
    assert float(factors.gains[0]) == pytest.approx(float(values[0]), rel=1e-3)
    # No single output gets a larger error than it had, also where it is far below the others'.
    before = given.outputs.square().sum(1)
    assert bool((rest <= 1.001 * before + 1e-30 * total).all())


KINDS: dict[str, Callable[[Case, float], Case]] = {
    "dead channels": lambda c, big: Case(c.error, _columns(c.inputs, 0.0)),
    "dead channels with a large error": lambda c, big: Case(_columns(c.error, big), _columns(c.inputs, 0.0)),
    "massive channels": lambda c, big: Case(c.error, _columns(c.inputs, big)),
    "massive channels without an error": lambda c, big: Case(_columns(c.error, 0.0), _columns(c.inputs, big)),
    "large outputs": lambda c, big: Case(_columns(c.error.T, big).T.contiguous(), c.inputs),
    "exact outputs": lambda c, big: Case(_columns(c.error.T, 0.0).T.contiguous(), c.inputs),
    "one token": lambda c, big: Case(c.error, c.inputs[:1]),
    "two tokens": lambda c, big: Case(c.error, c.inputs[:2]),
}


def _columns(matrix: Tensor, factor: float) -> Tensor:
    changed = matrix.clone()
    changed[:, ::7] *= factor
    return changed


@pytest.mark.parametrize("route", ["moment", "energy"])
@pytest.mark.parametrize("big", [1e3, 1e9])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outputs", "inputs", "rank"), SHAPES)
def test_channels_and_tokens(outputs: int, inputs: int, rank: int, kind: str, big: float, route: str) -> None:
    given = KINDS[kind](case(outputs, inputs, tokens=1024), big)
    check(given, rank, solved(given, rank, route))


@pytest.mark.parametrize("route", ["moment", "energy"])
@pytest.mark.parametrize("weights", [1e-30, 1e30])
@pytest.mark.parametrize("activations", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize(("outputs", "inputs", "rank"), SHAPES)
def test_weights_and_activations_of_any_size(
    outputs: int, inputs: int, rank: int, weights: float, activations: float, route: str
) -> None:
    plain = case(outputs, inputs, tokens=1024)
    factors = solved(Case(plain.error * weights, plain.inputs * activations), rank, route)
    balance = factors.right.double().norm(dim=1) / factors.left.double().norm(dim=0)
    assert bool(((balance > 0.49) & (balance < 2.01)).all())
    # Undone in float64, so that the oracle needs no other numbers than those of the plain case.
    unit = (weights * activations) ** 2
    undone = Factors(factors.left, factors.right.double() / weights, factors.gains / unit, factors.total / unit)
    check(plain, rank, undone)


@pytest.mark.parametrize("route", ["moment", "energy"])
@pytest.mark.parametrize("kind", ["matrix", "diagonal", "low rank"])
@pytest.mark.parametrize("unit", [1e-30, 1e30])
@pytest.mark.parametrize("weights", [1e-30, 1e30])
def test_output_moments_of_any_size(weights: float, unit: float, kind: str, route: str) -> None:
    plain, root = case(300, 256, tokens=1024), case(12, 300, seed=3).inputs[:40]
    moments: dict[str, Any] = {
        "matrix": root.T @ root,
        "diagonal": (root.T @ root).diagonal(),
        "low rank": LowRankMoment(root[:20].square().sum(0), root[20:].T),
    }

    def factors(weights: float, unit: float) -> Factors:
        moment = moments[kind]
        if isinstance(moment, LowRankMoment):
            moment = LowRankMoment((moment.diagonal * unit).float(), (moment.factor * unit**0.5).float())
        else:
            moment = (moment * unit).float()
        return solved(Case(plain.error * weights, plain.inputs), 8, route, output_moment=moment, damping=0.03)

    expected, found = factors(1.0, 1.0), factors(weights, unit)
    torch.testing.assert_close(found.gains / weights**2 / unit, expected.gains, rtol=1e-3, atol=0.0)
    products = [part.left.double() @ part.right.double() for part in (found, expected)]
    assert float((products[0] / weights - products[1]).norm() / products[1].norm()) < 1e-2


@pytest.mark.parametrize("ratio", [1e-30, 1e-12, 1e-3, 1e30])
@pytest.mark.parametrize("route", ["moment", "energy"])
@pytest.mark.parametrize(("outputs", "inputs", "rank"), SHAPES)
def test_a_member_far_smaller_than_the_others_is_not_made_worse(
    outputs: int, inputs: int, rank: int, route: str, ratio: float
) -> None:
    plain = case(outputs, inputs, tokens=1024)
    rows = torch.ones(outputs, 1, dtype=torch.float64)
    rows[: outputs // 2] = ratio
    given = Case((plain.error * rows).float(), plain.inputs)
    rest, before = given.rest(solved(given, rank, route)), given.outputs.square().sum(1)
    assert bool((rest <= 1.0001 * before).all())


@pytest.mark.parametrize("peak", [65504.0, 6.1e-5])
def test_float16_errors_at_the_ends_of_their_range(peak: float) -> None:
    plain = case(300, 256, tokens=1024)
    error = (plain.error / plain.error.abs().max() * peak).half()
    assert bool(torch.isfinite(error).all())
    given = Case(error.float(), plain.inputs)
    factors = factorize(error, given.moment, 8)
    check(given, 8, factors)
    assert bool(torch.isfinite(factors.left.half()).all() and torch.isfinite(factors.right.half()).all())


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(300, 224, 8), (224, 400, 16)])
def test_no_seed_leaves_more_than_a_thousandth_above_the_optimum(
    outputs: int, inputs: int, rank: int, seeds: int
) -> None:
    excess, gains, totals = [], [], []
    for seed in range(seeds):
        given = case(outputs, inputs, tokens=1024, seed=seed)
        values = given.values()
        factors = factorize(given.error, given.moment, rank, seed=seed)
        least = float(values[rank:].sum())
        excess.append(float(given.rest(factors).sum()) / least - 1)
        gains.append(float(((factors.gains - values[:rank]) / values[:rank]).abs().max()))
        totals.append((factors.total - float(values.sum())) / least)
    assert bound(excess) < 1e-3
    assert bound(gains) < 1e-3
    # The total is an estimate: within about 1% of the part beyond the basis, and as often too high as too low.
    deviations = torch.tensor(totals, dtype=torch.float64)
    assert float(deviations.std()) < 0.03
    assert abs(float(deviations.mean())) < 7 * float(deviations.std()) / seeds**0.5


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize(("tokens", "width", "rank", "decay"), [(2000, 300, 40, 1.0), (800, 150, 24, 0.5)])
def test_no_seed_of_a_sketch_leaves_more_than_the_theorem_allows(
    tokens: int, width: int, rank: int, decay: float, seeds: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tokens, width, generator=generator) * torch.arange(1, width + 1).pow(-decay)
    rows = rows @ torch.randn(width, width, generator=generator)
    exact = rows.double().T @ rows.double() / tokens
    values, left = torch.linalg.eigvalsh(exact).flip(0), []
    for seed in range(seeds):
        sketch = GradientSketch(width, rank, seed, torch.device("cpu"))
        for part in rows.split(100):
            sketch.add(part)
        moment = sketch.moment(tokens)
        rest = exact - moment.factor.double() @ moment.factor.double().T
        left.append(float(rest.trace()))
        torch.testing.assert_close(moment.full_diagonal(), exact.diagonal(), rtol=1e-5, atol=0.0)
        low, high = (float(value) for value in torch.linalg.eigvalsh(rest)[[0, -1]])
        assert low > -1e-3 * high
    # Tropp et al. (arXiv 1706.05736) theorem 4.1: the mean over seeds, at the rank of half the sketch.
    half = rank // 2 - 1
    assert bound(left) < (1 + half / (rank - half - 1)) * float(values[half:].sum())
