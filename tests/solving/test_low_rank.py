"""The solver compared with dense float64 linear algebra, which shares no code with it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from glowq.errors import ConfigError, NonFiniteError, RankError
from glowq.solving.low_rank import Factors, factorize, weighted_error
from glowq.solving.moments import LowRankMoment
from support.oracle import case

CHECKPOINT = Path(__file__).parents[2] / "examples" / "stdlib-llama" / "model.safetensors"
few = settings(derandomize=True, max_examples=12, deadline=None, database=None)
# (outputs, inputs, rank): wide and tall shapes below and above the size at which the solver uses Krylov iteration.
SHAPES = [(24, 40, 5), (64, 16, 16), (300, 224, 8), (224, 400, 16), (640, 256, 32)]


def layer(outputs: int, inputs: int, *, tokens: int = 2048, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return an error like that of rounding, and the moment of correlated inputs with two outlier channels."""
    found = case(outputs, inputs, tokens=tokens, seed=seed)
    return found.error, found.moment


def dense(moment: Tensor | None, width: int) -> Tensor:
    if moment is None:
        return torch.eye(width, dtype=torch.float64)
    return moment.double().diag() if moment.ndim == 1 else moment.double()


def square_root(moment: Tensor | None, width: int) -> Tensor:
    values, vectors = torch.linalg.eigh(dense(moment, width))
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def spectrum(error: Tensor, moment: Tensor | None) -> Tensor:
    """Return the squared singular values of E S^(1/2), descending: the error that each rank can remove."""
    return torch.linalg.svdvals(error.double() @ square_root(moment, error.shape[1])).square()


def product(factors: Factors) -> Tensor:
    return factors.left.double() @ factors.right.double()


def residual(error: Tensor, factors: Factors, moment: Tensor | None) -> float:
    rest = (error.double() - product(factors)) @ square_root(moment, error.shape[1])
    return float(rest.square().sum())


@pytest.mark.parametrize(("outputs", "inputs", "rank"), SHAPES)
@pytest.mark.parametrize("kind", ["full", "diagonal", "none"])
def test_residual_is_the_sum_of_the_discarded_eigenvalues(outputs: int, inputs: int, rank: int, kind: str) -> None:
    error, full = layer(outputs, inputs)
    moment = {"full": full, "diagonal": full.diagonal(), "none": None}[kind]
    values = spectrum(error, moment)
    factors = factorize(error, moment, rank)
    total = float(values.sum())
    assert residual(error, factors, moment) <= 1.001 * float(values[rank:].sum()) + 1e-12 * total
    assert weighted_error(error, factors, moment) == pytest.approx(
        residual(error, factors, moment), rel=1e-9, abs=1e-11 * total
    )
    assert total - float(factors.gains.sum()) == pytest.approx(float(values[rank:].sum()), rel=1e-3, abs=1e-6 * total)
    torch.testing.assert_close(factors.gains[0], values[0], rtol=1e-5, atol=0.0)
    assert (factors.gains.diff() <= 0).all()
    assert factors.total == pytest.approx(total, rel=0.05)
    assert factors.left.dtype == factors.right.dtype == torch.float32
    assert factors.gains.dtype == torch.float64


@few
@given(outputs=st.integers(2, 40), inputs=st.integers(2, 40), seed=st.integers(0, 99))
def test_more_rank_never_leaves_more_and_full_rank_restores(outputs: int, inputs: int, seed: int) -> None:
    error, moment = layer(outputs, inputs, seed=seed)
    whole = factorize(error, moment, min(outputs, inputs))
    left = [residual(error, whole.cut(rank), moment) for rank in range(1, min(outputs, inputs) + 1)]
    total = float(spectrum(error, moment).sum())
    assert all(after <= before + 1e-12 * total for before, after in pairwise(left))
    torch.testing.assert_close(product(whole), error.double(), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize(("outputs", "inputs"), [(48, 32), (320, 256)])
def test_every_cut_is_the_optimum_of_its_rank(outputs: int, inputs: int) -> None:
    error, moment = layer(outputs, inputs)
    values = spectrum(error, moment)
    factors = factorize(error, moment, 16)
    for rank in (1, 4, 9, 16):
        cut = factors.cut(rank)
        assert (cut.left.shape, cut.right.shape) == ((outputs, rank), (rank, inputs))
        assert residual(error, cut, moment) <= 1.001 * float(values[rank:].sum())


@few
@given(members=st.integers(2, 4), seed=st.integers(0, 99))
def test_sharing_lies_between_each_module_alone_and_plain_svd(members: int, seed: int) -> None:
    error, moment = layer(24 * members, 30, seed=seed)
    shared = residual(error, factorize(error, moment, 5), moment)
    alone = sum(residual(part, factorize(part, moment, 5), moment) for part in error.split(24))
    plain = residual(error, factorize(error, None, 5), moment)
    assert alone <= shared * (1 + 1e-6)
    assert shared <= plain * (1 + 1e-6)


@pytest.mark.parametrize(("outputs", "inputs"), [(40, 24), (288, 256)])
def test_permuting_or_rotating_the_inputs_changes_no_gain(outputs: int, inputs: int) -> None:
    error, moment = layer(outputs, inputs)
    gains = factorize(error, moment, 6).gains
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(1))
    rotation = torch.linalg.qr(
        torch.randn(inputs, inputs, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    )[0]
    permuted = factorize(error[:, order], moment[order][:, order], 6)
    rotated = factorize(error.double() @ rotation, rotation.T @ moment @ rotation, 6)
    torch.testing.assert_close(permuted.gains, gains, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(rotated.gains, gains, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(24, 40, 5), (224, 400, 16)])
def test_streamed_energy_gives_what_the_moment_gives(outputs: int, inputs: int, rank: int) -> None:
    error, moment = layer(outputs, inputs)
    energy = error.double() @ moment @ error.double().T
    by_energy, by_moment = factorize(error, None, rank, energy=energy), factorize(error, moment, rank)
    torch.testing.assert_close(by_energy.gains, by_moment.gains, rtol=1e-3, atol=0.0)
    assert residual(error, by_energy, moment) == pytest.approx(residual(error, by_moment, moment), rel=1e-3)


@pytest.mark.parametrize("route", ["moment", "energy"])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(30, 44, 6), (44, 30, 6), (260, 240, 16)])
def test_two_sided_weighting_is_optimal(outputs: int, inputs: int, rank: int, kind: str, route: str) -> None:
    error, moment = layer(outputs, inputs)
    gradient = layer(8, outputs, seed=3)[1] * 1e-6
    output_moment = gradient if kind == "full" else gradient.diagonal()
    given_moment = moment if route == "moment" else None
    energy = None if route == "moment" else error.double() @ moment @ error.double().T
    factors = factorize(error, given_moment, rank, energy=energy, output_moment=output_moment, damping=0.05)
    damped = dense(output_moment, outputs)
    damped = damped + 0.05 * damped.diagonal().mean() * torch.eye(outputs, dtype=torch.float64)
    outside, inside = square_root(damped, outputs), square_root(moment, inputs)
    values = torch.linalg.svdvals(outside @ error.double() @ inside).square()
    rest = float((outside @ (error.double() - product(factors)) @ inside).square().sum())
    assert rest <= 1.001 * float(values[rank:].sum())
    torch.testing.assert_close(factors.gains, values[:rank], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(24, 40, 5), (400, 256, 16)])
def test_same_seed_gives_the_same_bits_and_leaves_the_global_state(outputs: int, inputs: int, rank: int) -> None:
    error, moment = layer(outputs, inputs)
    before = torch.get_rng_state()
    first, second = factorize(error, moment, rank, seed=7), factorize(error, moment, rank, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)
    assert torch.equal(first.gains, second.gains)
    other = factorize(error, moment, rank, seed=8)
    torch.testing.assert_close(other.gains, first.gains, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(("outputs", "inputs"), [(40, 32), (400, 256)])
@pytest.mark.parametrize("error_scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("moment_scale", [1e-8, 1.0, 1e8])
def test_scale_of_the_inputs_only_scales_the_gains(
    outputs: int, inputs: int, error_scale: float, moment_scale: float
) -> None:
    error, moment = layer(outputs, inputs)
    plain = factorize(error, moment, 6)
    scaled = factorize(error * error_scale, moment * moment_scale, 6)
    torch.testing.assert_close(scaled.gains, plain.gains * error_scale**2 * moment_scale, rtol=1e-4, atol=0.0)
    ratio = scaled.right.norm(dim=1) / scaled.left.norm(dim=0)
    assert ((ratio > 0.499) & (ratio < 2.001)).all()
    peaks = scaled.left.gather(0, scaled.left.abs().argmax(dim=0, keepdim=True))
    assert (peaks > 0).all()


@pytest.mark.parametrize(("outputs", "inputs"), [(40, 64), (320, 256)])
def test_fewer_tokens_than_inputs_and_dead_channels(outputs: int, inputs: int) -> None:
    error, moment = layer(outputs, inputs, tokens=12)
    moment[:, 5:9], moment[5:9] = 0.0, 0.0
    factors = factorize(error, moment, 20)
    values = spectrum(error, moment)
    assert torch.isfinite(factors.left).all()
    assert torch.isfinite(factors.right).all()
    assert residual(error, factors, moment) <= 1e-8 * float(values.sum())
    assert residual(error, factors.cut(6), moment) <= 1.001 * float(values[6:].sum())


@pytest.mark.parametrize(("outputs", "inputs"), [(40, 32), (400, 300)])
@pytest.mark.parametrize("weighted", [True, False])
def test_columns_beyond_the_exact_rank_are_zero(outputs: int, inputs: int, weighted: bool) -> None:
    noise, full = layer(outputs, inputs)
    error, moment = noise[:, :3] @ noise[:3], full if weighted else None
    factors = factorize(error, moment, 10)
    assert (factors.gains[:3] > 0).all()
    assert not factors.gains[3:].any()
    assert not factors.left[:, 3:].any()
    assert not factors.right[3:].any()
    torch.testing.assert_close(product(factors), error.double(), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("zero", ["error", "moment", "energy", "output_moment", "low rank output_moment"])
def test_nothing_to_correct_gives_zero_factors(zero: str) -> None:
    error, moment = layer(12, 9)
    options: dict[str, Any] = {}
    if zero == "error":
        error = torch.zeros_like(error)
    if zero in {"energy", "output_moment"}:
        options[zero] = torch.zeros(12, 12)
    if zero == "low rank output_moment":
        options["output_moment"] = LowRankMoment(torch.zeros(12), torch.zeros(12, 3))
    factors = factorize(error, None if zero == "energy" else moment * (zero != "moment"), 4, **options)
    assert (factors.left.shape, factors.right.shape, factors.gains.shape) == ((12, 4), (4, 9), (4,))
    assert not factors.left.any()
    assert not factors.right.any()
    assert not factors.gains.any()


def test_one_direction_ten_million_times_the_residual_costs_no_accuracy() -> None:
    error, moment = layer(400, 256)
    scale = torch.ones(256, dtype=torch.float64)
    scale[:3] = torch.tensor([50000.0, 100.0, 30.0])
    moment = scale[:, None] * moment * scale
    values = spectrum(error, moment)
    assert float(values[0] / values[16:].sum()) > 1e7
    assert residual(error, factorize(error, moment, 16), moment) <= 1.001 * float(values[16:].sum())


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    blocks = weight.float().view(weight.shape[0], -1, group)
    low = blocks.amin(2, keepdim=True)
    step = (blocks.amax(2, keepdim=True) - low) / (2**bits - 1)
    return (((blocks - low) / step).round() * step + low).view_as(weight)


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize(
    "members", [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"),
                ("mlp.down_proj",)], ids=["qkv", "gate-up", "down"]
)  # fmt: skip
def test_real_layers_within_a_thousandth_of_the_optimum(members: tuple[str, ...], rank: int) -> None:
    with safe_open(CHECKPOINT, "pt") as file:
        weight = torch.cat([file.get_tensor(f"model.layers.1.{member}.weight") for member in members]).float()
    error = weight - round_to_nearest(weight, bits=3, group=64)
    width = weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    loud = torch.exp(torch.randn(width, generator=generator, dtype=torch.float64))
    places = torch.arange(width, dtype=torch.float64)
    moment = loud[:, None] * loud * 0.9 ** (places[:, None] - places).abs()
    best = float(spectrum(error, moment)[rank:].sum())
    assert residual(error, factorize(error, moment, rank), moment) <= 1.001 * best
    energy = error.double() @ moment @ error.double().T
    assert residual(error, factorize(error, None, rank, energy=energy), moment) <= 1.001 * best


@pytest.mark.parametrize("name", ["error", "moment", "energy", "output_moment"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_tensors_are_named(name: str, value: float) -> None:
    error, moment = layer(6, 5)
    tensors: dict[str, Tensor] = {"error": error, "moment": moment, "output_moment": torch.eye(6)}
    if name == "energy":
        tensors = {"error": error, "energy": torch.eye(6)}
    tensors[name][1, 2] = value
    with pytest.raises(NonFiniteError, match=rf"^{name} \(\d, \d\) must be finite; found NaN or Inf"):
        factorize(tensors["error"], tensors.get("moment"), 2, energy=tensors.get("energy"),
                  output_moment=tensors.get("output_moment"))  # fmt: skip


@pytest.mark.parametrize("rank", [-1, 0, 6])
def test_impossible_ranks_are_refused(rank: int) -> None:
    error, moment = layer(6, 5)
    with pytest.raises(RankError, match=rf"^rank must lie in 1\.\.5, error being 6 x 5; found {rank}\.$"):
        factorize(error, moment, rank)
    with pytest.raises(RankError, match=rf"^rank must lie in 1\.\.5, the rank of these factors; found {rank}\.$"):
        factorize(error, moment, 5).cut(rank)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moment": torch.eye(6)}, r"moment must have shape \(5, 5\) or \(5,\); found \(6, 6\)\."),
        ({"moment": torch.ones(6)}, r"moment must have shape \(5, 5\) or \(5,\); found \(6,\)\."),
        ({"energy": torch.eye(5)}, r"energy must have shape \(6, 6\); found \(5, 5\)\."),
        ({"energy": torch.ones(6)}, r"energy must have shape \(6, 6\); found \(6,\)\."),
        ({"output_moment": torch.eye(5)}, r"output_moment must have shape \(6, 6\) or \(6,\); found \(5, 5\)\."),
        ({"moment": torch.eye(5), "energy": torch.eye(6)}, "moment and energy were both given; give one"),
        (
            {"output_moment": LowRankMoment(torch.ones(6), torch.ones(5, 2))},
            r"output_moment must have shapes \(6,\) and \(6, k\); found \(6,\) and \(5, 2\)\.",
        ),
        (
            {"output_moment": LowRankMoment(torch.ones(6, 6), torch.ones(6, 2))},
            r"output_moment must have shapes \(6,\) and \(6, k\); found \(6, 6\) and \(6, 2\)\.",
        ),
        ({"output_moment": torch.eye(6), "damping": 0.0}, r"damping must be positive; found 0\.0\."),
        ({"error": torch.zeros(5)}, r"error must have shape \(outputs, inputs\); found \(5,\)\."),
    ],
)
def test_misshaped_arguments_are_refused(options: dict[str, object], message: str) -> None:
    arguments = {"error": torch.ones(6, 5), "moment": None, "rank": 2} | options
    with pytest.raises(ConfigError, match=message):
        factorize(**arguments)  # type: ignore[arg-type]
