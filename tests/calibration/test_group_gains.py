"""What each group's correction is worth beside the others, compared with divergences of whole forwards in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from glowq.calibration import group_gains
from glowq.calibration.group_gains import GroupGain, calibrated, measure_groups
from glowq.calibration.path_gains import gains_along_path
from glowq.data.tokens import token_sequences
from glowq.errors import SensitivityError
from glowq.evaluation.divergence import kl_gradient
from glowq.evaluation.intervals import Interval
from glowq.factors.factors import GroupFactors
from glowq.factors.group import Group
from glowq.factors.units import GainUnit
from glowq.models.tracing import find_groups
from glowq.runtime.attach import applied, attached, detach
from support.encoders import random_encoder
from support.tiny import TEXTS, correct, load, quantized
from support.tiny import tiny_llama as saved_llama

Factory = Callable[..., Any]
POINTS = (0.5 - math.sqrt(1 / 12), 0.5 + math.sqrt(1 / 12))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 64, (6, 16), generator=torch.Generator().manual_seed(3))


def scaled(entry: GroupFactors, strength: float) -> GroupFactors:
    return replace(entry, lefts={name: left * strength for name, left in entry.lefts.items()})


def noisy(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight += 0.02 * torch.randn(module.weight.shape, generator=generator).to(module.weight)
    return model


@pytest.fixture
def pair(tiny_llama: Factory) -> tuple[nn.Module, nn.Module]:
    """A reference model in float64, and a copy with noise on every linear weight in place of a quantized model."""
    models = [tiny_llama(num_hidden_layers=3).double() for _ in range(2)]
    return models[0], noisy(models[1])


def factors_for(model: nn.Module, ids: Tensor, random_factors: Factory, scale: float) -> list[GroupFactors]:
    found = [random_factors(group, scale=scale) for group in find_groups(model, {"input_ids": ids})]
    return [
        replace(entry, right=entry.right.double(), lefts={name: left.double() for name, left in entry.lefts.items()})
        for entry in found
    ]


@torch.no_grad()
def divergence(reference: nn.Module, model: nn.Module, ids: Tensor, factors: Sequence[GroupFactors]) -> float:
    """Mean KL divergence per token, or for an encoder mean squared distance per sequence, in float64."""
    wanted = reference(input_ids=ids)
    with applied(model, factors):
        given = model(input_ids=ids)
    if hasattr(wanted, "logits"):
        first, second = (output.logits.double().log_softmax(-1) for output in (wanted, given))
        return float((first.exp() * (first - second)).sum(-1).mean())
    parts = []
    for output in (wanted, given):
        tokens, pooled = output.last_hidden_state.double(), output.pooler_output.double()
        parts.append([nn.functional.normalize(state, dim=-1) for state in (tokens, pooled, tokens.mean(1))])
    tokens, pooled, means = ((one - other).square().sum(-1) for one, other in zip(*parts, strict=True))
    return float((tokens.mean(1) + pooled + means).mean())


def numeric(reference: nn.Module, model: nn.Module, ids: Tensor, factors: list[GroupFactors], index: int) -> float:
    """The mean over both points of the divergence's decrease by the strength of one group, by central differences."""
    step, found = 1e-2, []
    for point in POINTS:
        ends = []
        for own in (point - step, point + step):
            mixed = [scaled(entry, own if place == index else point) for place, entry in enumerate(factors)]
            ends.append(divergence(reference, model, ids, mixed))
        found.append((ends[0] - ends[1]) / (2 * step))
    return sum(found) / len(found)


def test_gains_are_derivatives_along_the_path(
    pair: tuple[nn.Module, nn.Module], ids: Tensor, random_factors: Factory
) -> None:
    reference, model = pair
    factors = factors_for(model, ids, random_factors, 0.2)
    found = measure_groups(model, reference, factors, ids)
    assert list(found) == [entry.group.name for entry in factors]
    before = divergence(reference, model, ids, [])
    for index, entry in enumerate(factors):
        measured = found[entry.group.name]
        assert measured.unit == "nats"
        assert measured.before == pytest.approx(before, rel=1e-4)
        assert measured.interval.value == pytest.approx(
            numeric(reference, model, ids, factors, index), rel=2e-3, abs=1e-6
        )
        assert measured.interval.low < measured.interval.value < measured.interval.high
        assert measured.gain == max(0.0, measured.interval.value)
        assert measured.harms == (measured.interval.high < 0)


def test_gains_add_up_to_what_all_corrections_gain(
    pair: tuple[nn.Module, nn.Module], ids: Tensor, random_factors: Factory
) -> None:
    reference, model = pair
    factors = factors_for(model, ids, random_factors, 0.2)
    found = measure_groups(model, reference, factors, ids)
    whole = divergence(reference, model, ids, []) - divergence(reference, model, ids, factors)
    assert abs(whole) > 1e-3
    assert sum(one.interval.value for one in found.values()) == pytest.approx(whole, rel=0.02)


def test_the_model_is_left_as_it_was(pair: tuple[nn.Module, nn.Module], ids: Tensor, random_factors: Factory) -> None:
    reference, model = pair
    model.train()
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    measure_groups(model, reference, factors_for(model, ids, random_factors, 0.2), ids)
    assert model.training
    assert attached(model) == {}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name][0])
        assert value.requires_grad == before[name][1]
        assert value.grad is None


def corrections(model: nn.Module, factors: list[GroupFactors]) -> list[Any]:
    return [group_gains._Correction(model, entry) for entry in factors]


@pytest.mark.parametrize("large", [False, True])
def test_batches_and_recomputed_blocks_change_nothing(
    large: bool, pair: tuple[nn.Module, nn.Module], ids: Tensor, random_factors: Factory, monkeypatch: Any
) -> None:
    reference, model = pair
    factors = factors_for(model, ids, random_factors, 0.2)
    whole, *_ = gains_along_path(model, reference, corrections(model, factors), ids)
    monkeypatch.setattr("glowq.calibration.path_gains._BATCH_TOKENS", 4 * ids.shape[1])  # 4 sequences, then 2
    monkeypatch.setattr("glowq.calibration.path_gains.is_large", lambda *_: large)
    parted, *_ = gains_along_path(model, reference, corrections(model, factors), ids)
    for name, values in parted.items():
        assert values.shape == ids.shape
        torch.testing.assert_close(values, whole[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["bert", "albert"])  # ALBERT's layers share weights, so a block runs several times
def test_an_encoder_is_measured_by_its_states(kind: str, random_factors: Factory) -> None:
    ids = torch.randint(1, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    reference, model = random_encoder(kind).double(), noisy(random_encoder(kind).double())
    factors = factors_for(model, ids, random_factors, 0.2)
    found = measure_groups(model, reference, factors, ids)
    for index, entry in enumerate(factors):
        assert found[entry.group.name].unit == "squared distance"
        assert found[entry.group.name].before == pytest.approx(divergence(reference, model, ids, []), rel=1e-3)
        wanted = numeric(reference, model, ids, factors, index)
        assert found[entry.group.name].interval.value == pytest.approx(wanted, rel=5e-3, abs=1e-5)


def test_half_precision(pair: tuple[nn.Module, nn.Module], ids: Tensor, random_factors: Factory) -> None:
    reference, model = pair
    factors = factors_for(model, ids, random_factors, 0.2)
    exact = measure_groups(model, reference, factors, ids)
    half = [
        replace(
            entry, right=entry.right.bfloat16(), lefts={name: left.bfloat16() for name, left in entry.lefts.items()}
        )
        for entry in factors
    ]
    found = measure_groups(model.bfloat16(), reference.bfloat16(), half, ids)
    largest = max(abs(one.interval.value) for one in exact.values())
    for name, one in found.items():
        assert one.interval.value == pytest.approx(exact[name].interval.value, rel=0.1, abs=0.05 * largest)


def test_repeated_tokens_are_no_evidence(pair: tuple[nn.Module, nn.Module], random_factors: Factory) -> None:
    reference, model = pair
    ids = torch.randint(1, 64, (1, 4), generator=torch.Generator().manual_seed(3)).repeat(1, 8)  # one part
    for one in measure_groups(model, reference, factors_for(model, ids, random_factors, 0.2), ids).values():
        assert (one.interval.low, one.interval.high) == (-math.inf, math.inf)
        assert not one.harms


def test_a_group_without_a_correction_gains_nothing(
    pair: tuple[nn.Module, nn.Module], ids: Tensor, random_factors: Factory
) -> None:
    reference, model = pair
    factors = factors_for(model, ids, random_factors, 0.2)
    factors[1] = scaled(factors[1], 0.0)
    found = measure_groups(model, reference, factors, ids)
    assert found[factors[1].group.name].gain == 0
    assert found[factors[0].group.name].interval.value != 0


def test_a_correction_that_increases_the_error_harms(pair: tuple[nn.Module, nn.Module]) -> None:
    reference, model = pair
    ids = torch.randint(1, 64, (48, 16), generator=torch.Generator().manual_seed(3))
    group = next(group for group in find_groups(model, {"input_ids": ids}) if group.name.endswith("down_proj"))
    (name,) = group.members
    error = (reference.get_submodule(name).weight - model.get_submodule(name).weight).detach().float()  # type: ignore[operator, union-attr]
    left, values, right = torch.linalg.svd(error)
    right = values[:8, None] * right[:8]
    entry = GroupFactors(group, right, {name: left[:, :8].contiguous()}, torch.ones(8, dtype=torch.float64), 1.0)
    good, bad = (measure_groups(model, reference, [scaled(entry, sign)], ids)[group.name] for sign in (1, -1))
    assert good.interval.low > 0
    assert not good.harms
    assert bad.harms
    assert bad.gain == 0


class Rounded(nn.Module):
    """A layer that rounds its input, so that no gradient passes."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.in_features, self.out_features = layer.weight, layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return nn.functional.linear((x * 64).round() / 64, self.weight)


def test_layers_without_a_gradient_are_measured_one_by_one(
    pair: tuple[nn.Module, nn.Module], ids: Tensor, random_factors: Factory
) -> None:
    reference, model = pair
    factors = factors_for(model, ids, random_factors, 0.2)
    for block in model.model.layers:  # type: ignore[union-attr]
        block.mlp.down_proj = Rounded(block.mlp.down_proj)  # type: ignore[union-attr]
    with pytest.raises(SensitivityError, match="no finite gradient of the divergence reaches its outputs"):
        gains_along_path(model, reference, corrections(model, factors), ids)
    found = measure_groups(model, reference, factors, ids)
    alone = group_gains._one_by_one(model, reference, factors, ids)
    assert found == alone
    assert attached(model) == {}
    for entry in factors:
        plain = divergence(reference, model, ids, [])
        given = divergence(reference, model, ids, [entry])
        with applied(model, [entry]):
            change = divergence(model, model, ids, [])
        assert change == 0
        assert found[entry.group.name].interval.value > (plain - given) / 2 - 1e-6  # the change is no less than zero


@pytest.mark.parametrize("widths", [(64, 64), (64, 70), (70, 64)])
def test_the_gradient_of_the_divergence_is_that_of_autograd(widths: tuple[int, int]) -> None:
    """Also where one of the two vocabularies is padded."""
    generator = torch.Generator().manual_seed(0)
    reference, logits = (torch.randn(2, 3, width, generator=generator) for width in widths)
    logits.requires_grad_()
    common = min(widths)
    first, second = (part[..., :common].log_softmax(-1) for part in (reference, logits))
    (first.exp() * (first - second)).sum().backward()
    found = kl_gradient(reference.log_softmax(-1), logits.detach())
    torch.testing.assert_close(found, logits.grad, rtol=1e-4, atol=1e-6)


def test_gains_take_the_unit_of_what_was_measured(tmp_path: Path) -> None:
    source = saved_llama(tmp_path / "source", dtype=torch.float32)
    model = quantized(source, "torchao-int2", dtype=torch.float32)
    correction = correct(model, source, rank=16)
    assert correction.config.provenance.gains == "nats"
    assert correction.config.provenance.measured_tokens == 128
    sequences = token_sequences(TEXTS, AutoTokenizer.from_pretrained(source), length=128, limit=512, seed=1)
    detach(model)
    measured = measure_groups(model, load(source), correction.factors, sequences)
    changed = calibrated(correction.factors, measured)
    ratios = []
    for before, after in zip(correction.factors, changed, strict=True):
        predicted = float(before.gains.sum())
        if predicted > 0:  # of gains that were measured on other tokens, in nats as well
            ratios.append(float(after.gains.sum()) / predicted)
            if ratios[-1]:
                assert after.total / before.total == pytest.approx(ratios[-1], rel=1e-9)
    assert 0.4 < median(ratios) < 2.5


def gained(values: Tensor, spread: float) -> dict[str, GroupGain]:
    """Measured gains whose intervals are four times `spread` wide."""
    found = enumerate(values.tolist())
    return {
        str(index): GroupGain(Interval(value, value - 2 * spread, value + 2 * spread), 1.0, GainUnit.NATS)
        for index, value in found
    }


def predicted_factors(gains: Tensor) -> list[GroupFactors]:
    found = []
    for index, gain in enumerate(gains.tolist()):
        group = Group(str(index), (f"{index}.q",), 4, (4,), "")
        ranks = torch.tensor([0.75 * gain, 0.25 * gain], dtype=torch.float64)
        found.append(GroupFactors(group, torch.zeros(2, 4), {f"{index}.q": torch.zeros(4, 2)}, ranks, 3 * gain))
    return found


def sums(factors: list[GroupFactors]) -> Tensor:
    return torch.stack([entry.gains.sum() for entry in factors])


class TestCalibrated:
    predictions = torch.tensor([8.0, 4.0, 2.0, 2.0], dtype=torch.float64)
    values = torch.tensor([0.9, 0.1, 0.4, 0.2], dtype=torch.float64)

    def test_exact_measurements_are_taken_as_they_are(self) -> None:
        found = calibrated(predicted_factors(self.predictions), gained(self.values, 0.0))
        torch.testing.assert_close(sums(found), self.values)
        for before, after in zip(predicted_factors(self.predictions), found, strict=True):
            assert after.total / before.total == pytest.approx(float(after.gains.sum() / before.gains.sum()))
            assert float(after.gains[0] / after.gains[1]) == pytest.approx(3)

    @pytest.mark.parametrize("spread", [math.inf, 10.0])
    def test_noise_says_nothing_beyond_the_sum(self, spread: float) -> None:
        found = calibrated(predicted_factors(self.predictions), gained(self.values, spread))
        torch.testing.assert_close(sums(found), self.predictions / 10)  # 1.6 in all, where 16 were predicted

    def test_a_group_without_a_gain_keeps_its_error(self) -> None:
        values = torch.tensor([0.8, 0.4, 0.2, -0.3], dtype=torch.float64)
        found = calibrated(predicted_factors(self.predictions), gained(values, 0.0))
        assert not found[3].gains.any()
        assert found[3].total == pytest.approx(6 * 0.1)

    def test_nothing_is_gained_in_all(self) -> None:
        found = calibrated(predicted_factors(self.predictions), gained(torch.tensor([0.1, -0.4, 0.1, 0.1]), 0.1))
        torch.testing.assert_close(
            sums(found), torch.tensor([0.1, 0.0, 0.1, 0.1], dtype=torch.float64), rtol=1e-6, atol=1e-8
        )

    def test_of_noisy_gains_the_estimates_are_nearer_than_either(self) -> None:
        draw = torch.Generator().manual_seed(0)
        predictions = 10 * torch.rand(2000, generator=draw, dtype=torch.float64)
        true = predictions / 5 * (1 + 0.4 * torch.randn(2000, generator=draw, dtype=torch.float64))
        noisy = true + 0.5 * torch.randn(2000, generator=draw, dtype=torch.float64)
        found = sums(calibrated(predicted_factors(predictions), gained(noisy, 0.5)))
        errors = {
            name: float((values - true).square().mean())
            for name, values in {"both": found, "measured": noisy, "predicted": predictions / 5}.items()
        }
        # The best linear estimate, which knows the truth's own spread:
        weight = (0.08 * predictions) ** 2 / ((0.08 * predictions) ** 2 + 0.25)
        best = float((predictions / 5 + weight * (noisy - predictions / 5) - true).square().mean())
        assert errors["both"] < 0.8 * min(errors["measured"], errors["predicted"])
        assert errors["both"] < 1.05 * best


def test_a_group_that_only_does_harm_is_not_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved_llama(tmp_path / "source")
    whole = correct(quantized(source, "torchao-int2"), source, rank=None, budget="5%")
    reversed_group = max(whole.factors, key=lambda entry: float(entry.gains.sum())).group

    from glowq.pipeline.block_solver import BlockSolver

    solve = BlockSolver.solve

    def negated(entry: GroupFactors) -> GroupFactors:
        return replace(entry, lefts={name: -left for name, left in entry.lefts.items()})

    def solve_reversed(self: Any, stops: Any, sequences: Tensor) -> list[list[GroupFactors]]:
        """Solve, and reverse the sign of the correction of `reversed_group`, so that it increases the error."""
        (found,) = solve(self, stops, sequences)
        return [[negated(entry) if entry.group == reversed_group else entry for entry in found]]

    monkeypatch.setattr(BlockSolver, "solve", solve_reversed)
    guarded = correct(quantized(source, "torchao-int2"), source, rank=None, budget="5%")
    assert reversed_group.name in whole.ranks
    assert reversed_group.name not in guarded.ranks
    assert guarded.factor_bytes <= 0.05 * guarded.base_bytes
