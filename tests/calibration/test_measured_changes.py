"""The measured effect of one change on the model's outputs, compared with whole forwards of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glowq.calibration.measured_changes import Change, Measured, measure_changes
from glowq.factors.factors import GroupFactors
from glowq.models.tracing import find_groups
from glowq.runtime.attach import applied, attach, detach
from support.encoders import random_encoder

Factory = Callable[..., Any]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 64, (6, 16), generator=torch.Generator().manual_seed(3))


def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.double().log_softmax(-1)


def kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(-1).flatten()


def measure_groups(
    model: nn.Module, reference: nn.Module, factors: Sequence[GroupFactors], ids: Tensor
) -> dict[str, Measured]:
    """Measure the correction of each group as a change."""

    def change(entry: GroupFactors) -> Change:
        def attached(scale: float) -> Any:
            lefts = {member: left * scale for member, left in entry.lefts.items()}
            return applied(model, [replace(entry, lefts=lefts)])

        return Change(entry.group.name, entry.group.block, attached, float(entry.gains.sum()))

    return measure_changes(model, reference, [change(entry) for entry in factors], ids)


def attached(model: nn.Module, entry: GroupFactors, run: Callable[[], Tensor]) -> Tensor:
    attach(model, entry)
    try:
        return run()
    finally:
        detach(model)


@pytest.fixture
def pair(tiny_llama: Factory) -> tuple[nn.Module, nn.Module]:
    """A reference model, and a copy with noise on every linear weight in place of a quantized model."""
    reference, model = tiny_llama(num_hidden_layers=3), tiny_llama(num_hidden_layers=3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight += 0.02 * torch.randn_like(module.weight)
    return reference, model


def test_changes_and_benefits_are_those_of_whole_forwards(
    pair: tuple[nn.Module, nn.Module], ids: Tensor, random_factors: Factory
) -> None:
    reference, model = pair
    factors = [random_factors(group, scale=0.2) for group in find_groups(model, {"input_ids": ids})]
    found = measure_groups(model, reference, factors, ids)
    wanted, plain = log_probabilities(reference, ids), log_probabilities(model, ids)
    for entry in factors:
        given = attached(model, entry, lambda: log_probabilities(model, ids))
        benefit = kl(wanted, plain) - kl(wanted, given)
        measured = found[entry.group.name]
        assert measured.unit == "nats"
        assert measured.change == pytest.approx(float(kl(plain, given).mean()), rel=1e-3)
        assert measured.benefit.value == pytest.approx(float(benefit.mean()), rel=1e-3, abs=1e-7)
        sequences = benefit.reshape(ids.shape).mean(1)  # shorter than a part: each is one independent value
        spread = 2.5706 * float(sequences.std()) / math.sqrt(len(sequences))  # Student's t, 5 degrees of freedom
        assert measured.benefit.high - measured.benefit.value == pytest.approx(spread, rel=2e-3)
    assert torch.equal(log_probabilities(model, ids), plain)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("scale", [0.2, 0.012])  # of which the second is amplified
def test_a_smaller_last_batch_counts_as_little_as_it_is(
    scale: float, pair: tuple[nn.Module, nn.Module], ids: Tensor, random_factors: Factory, monkeypatch: Any
) -> None:
    reference, model = pair
    factors = [random_factors(group, scale=scale) for group in find_groups(model, {"input_ids": ids})][:2]
    whole = measure_groups(model, reference, factors, ids)
    monkeypatch.setattr("glowq.calibration.block_replay._BATCH_TOKENS", 5 * ids.shape[1])  # 5 sequences, then 1
    parted = measure_groups(model, reference, factors, ids)
    for name, found in parted.items():
        assert found.change == pytest.approx(whole[name].change, rel=1e-3 if scale == 0.2 else 0.02)
        assert found.benefit.value == pytest.approx(whole[name].benefit.value, rel=1e-3, abs=1e-8)


def test_tokens_of_one_sequence_are_not_independent(pair: tuple[nn.Module, nn.Module], random_factors: Factory) -> None:
    """The same text twice is not more evidence: repeated tokens have benefits that depend on each other."""
    reference, model = pair
    ids = torch.randint(1, 64, (1, 4), generator=torch.Generator().manual_seed(3)).repeat(1, 8)  # one part
    entry = random_factors(find_groups(model, {"input_ids": ids})[0], scale=0.2)
    found = measure_groups(model, reference, [entry], ids)[entry.group.name]
    assert found.benefit.low == -math.inf
    assert found.benefit.high == math.inf


def test_a_small_change_is_told_from_rounding(pair: tuple[nn.Module, nn.Module], random_factors: Factory) -> None:
    """A small change is measured in bfloat16, although rounding alone changes the outputs by about 1e-4 nats."""
    reference, model = pair
    # Rounding differs between processors and between tokens. Many tokens make its mean the same on all processors.
    ids = torch.randint(1, 64, (48, 16), generator=torch.Generator().manual_seed(3))
    tiny = [random_factors(group, scale=0.012) for group in find_groups(model, {"input_ids": ids})]
    exact = {
        entry.group.name: float(
            kl(log_probabilities(model, ids), attached(model, entry, lambda: log_probabilities(model, ids))).mean()
        )
        for entry in tiny
    }
    assert max(exact.values()) < 1e-4
    half = [
        replace(
            entry, right=entry.right.bfloat16(), lefts={name: left.bfloat16() for name, left in entry.lefts.items()}
        )
        for entry in tiny
    ]
    largest = max(exact, key=lambda name: exact[name])
    benefit = measure_groups(model, reference, tiny, ids)[largest].benefit  # in float32 nothing is amplified
    model, reference = model.bfloat16(), reference.bfloat16()
    measured = measure_groups(model, reference, half, ids)[largest]
    assert measured.change == pytest.approx(exact[largest], rel=0.5)
    assert benefit.low < measured.benefit.value < benefit.high
    entry = next(entry for entry in half if entry.group.name == largest)
    plain = log_probabilities(model, ids)
    assert float(kl(plain, attached(model, entry, lambda: log_probabilities(model, ids))).mean()) > 5 * exact[largest]


def test_blocks_before_the_group_are_not_run_again(
    pair: tuple[nn.Module, nn.Module], ids: Tensor, random_factors: Factory
) -> None:
    reference, model = pair
    factors = [random_factors(group) for group in find_groups(model, {"input_ids": ids})]
    ran: list[str] = []
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj", "lm_head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    measure_groups(model, reference, factors, ids)
    forwards = [part.split() for part in " ".join(ran).split("lm_head")][:-1]
    assert {tuple(name[13] for name in forward) for forward in forwards} == {("0", "1", "2"), ("1", "2"), ("2",), ()}


def states(model: nn.Module, ids: Tensor) -> list[Tensor]:
    with torch.no_grad():
        output = model(input_ids=ids)
    tokens, pooled = output.last_hidden_state.double(), output.pooler_output.double()
    return [nn.functional.normalize(state, dim=-1) for state in (tokens, pooled, tokens.mean(1))]


@pytest.mark.parametrize("kind", ["bert", "albert"])  # ALBERT's layers share weights, so a block runs several times
def test_an_encoder_is_measured_by_its_states(kind: str, random_factors: Factory) -> None:
    ids = torch.randint(1, 64, (24, 16), generator=torch.Generator().manual_seed(0))
    model = random_encoder(kind)
    factors = [random_factors(group, scale=0.2) for group in find_groups(model, {"input_ids": ids})]
    found = measure_groups(model, model, factors, ids)
    plain = states(model, ids)
    for entry in factors:
        attach(model, entry)
        given = states(model, ids)
        detach(model)
        tokens, pooled, means = ((ours - theirs).square().sum(-1) for ours, theirs in zip(plain, given, strict=True))
        expected = float((tokens.mean(1) + pooled + means).mean())
        measured = found[entry.group.name]
        assert measured.unit == "squared distance"
        assert measured.change == pytest.approx(expected, rel=1e-3)
        assert measured.benefit.value == pytest.approx(-expected, rel=1e-3)  # the reference is the model itself
