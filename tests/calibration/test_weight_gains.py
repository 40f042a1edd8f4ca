"""The measured gain of other weights in one group, compared with whole forwards of a model that holds them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glowq.calibration.weight_gains import Weights, measure_weights
from glowq.errors import SensitivityError
from glowq.factors.group import Group
from glowq.models.tracing import find_groups

IDS = torch.randint(1, 64, (6, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def pair(tiny_llama: Callable[..., Any]) -> tuple[nn.Module, nn.Module]:
    """A reference model with biases, and a copy with noise on every linear weight in place of a quantized model."""
    settings = {"num_hidden_layers": 3, "attention_bias": True, "mlp_bias": True}
    reference, model = tiny_llama(**settings), tiny_llama(**settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
                reference.get_parameter(name).copy_(parameter)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight += 0.02 * torch.randn_like(module.weight)
    return reference, model


def log_probabilities(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.double().log_softmax(-1)


def kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(-1)


def weights_of(model: nn.Module) -> Weights:
    return lambda name, shape: model.get_submodule(name).weight.detach()


def changed(model: nn.Module, group: Group, errors: dict[str, Tensor]) -> Tensor:
    """The log probabilities of a copy whose weights have these errors added."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name in group.members:
            other.get_submodule(name).weight += errors[name]
    return log_probabilities(other)


def less_wrong(model: nn.Module, reference: nn.Module) -> nn.Module:
    """A copy of the model whose errors are 0.4 times the model's."""
    wider = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in wider.named_parameters():
            parameter.lerp_(reference.get_parameter(name), 0.6)
    return wider


@pytest.mark.parametrize("full", [False, True])
def test_gains_add_up_to_what_all_groups_gain_together(pair: tuple[nn.Module, nn.Module], full: bool) -> None:
    """In the wider model only the groups differ: its head has the reference's weights, as the model's has here."""
    reference, model = pair
    with torch.no_grad():
        model.lm_head.weight.copy_(reference.lm_head.weight)  # type: ignore[union-attr]
    wider = reference if full else less_wrong(model, reference)
    groups = find_groups(model, {"input_ids": IDS})
    plain, wanted = log_probabilities(model), log_probabilities(reference)
    sides = [weights_of(model), weights_of(reference), None if full else weights_of(wider)]
    found = measure_weights(model, reference, groups, *sides, IDS)  # type: ignore[arg-type]
    assert list(found) == [group.name for group in groups]
    together = float((kl(wanted, plain) - kl(wanted, log_probabilities(wider))).mean())
    assert sum(found.values()) == pytest.approx(together, rel=0.02)
    assert torch.equal(log_probabilities(model), plain)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_without_a_gradient_they_are_those_of_whole_forwards(
    pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise SensitivityError("no gradient")

    monkeypatch.setattr("glowq.calibration.weight_gains.gains_along_path", refuse)
    reference, model = pair
    wider = less_wrong(model, reference)
    groups = find_groups(model, {"input_ids": IDS})
    sides = [weights_of(side) for side in (model, reference, wider)]
    found = measure_weights(model, reference, groups, *sides, IDS)
    whole = measure_weights(model, reference, groups, *sides[:2], None, IDS)
    plain, wanted = log_probabilities(model), log_probabilities(reference)
    assert list(found) == list(whole) == [group.name for group in groups]
    helped = 0
    for group in groups:
        error = {name: sides[1](name, (0, 0)) - sides[0](name, (0, 0)) for name in group.members}
        left = {name: sides[2](name, (0, 0)) - sides[1](name, (0, 0)) for name in group.members}
        repaired = changed(model, group, error)
        benefit = float((kl(wanted, plain) - kl(wanted, repaired)).mean())
        removed = float(kl(plain, repaired).mean())
        remains = float(kl(plain, changed(model, group, left)).mean())
        mean = max(0.0, (removed + benefit) / 2)
        helped += mean > remains
        about = 0.1 * removed  # small changes are amplified
        assert whole[group.name] == pytest.approx(mean, abs=about)
        assert found[group.name] == pytest.approx(max(0.0, mean - remains), abs=about)
    assert helped > 3
    assert torch.equal(log_probabilities(model), plain)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_group_that_would_be_better_off_with_its_error_gains_nothing(pair: tuple[nn.Module, nn.Module]) -> None:
    model = pair[1]
    reference, group = copy.deepcopy(model), find_groups(model, {"input_ids": IDS})[0]
    with torch.no_grad():
        for name in group.members:
            reference.get_submodule(name).weight += 0.1 * torch.randn_like(reference.get_submodule(name).weight)
    right, plain = weights_of(reference), weights_of(model)

    def wrong(name: str, shape: tuple[int, int]) -> Tensor:
        """As far from the model's weight as the reference's, in the opposite direction."""
        return 2 * plain(name, shape) - right(name, shape)

    assert measure_weights(model, reference, [group], plain, right, None, IDS)[group.name] > 0
    found = measure_weights(model, reference, [group], plain, wrong, None, IDS)
    assert found == {group.name: 0.0}


def test_an_error_on_the_way_leaves_the_model_as_it_was(pair: tuple[nn.Module, nn.Module]) -> None:
    reference, model = pair
    groups = find_groups(model, {"input_ids": IDS})
    plain = log_probabilities(model)

    def misshaped(name: str, shape: tuple[int, int]) -> Tensor:
        return torch.zeros(3, 5)

    with pytest.raises(RuntimeError):
        measure_weights(model, reference, groups, weights_of(model), misshaped, None, IDS)
    assert torch.equal(log_probabilities(model), plain)
    assert not any("forward" in module.__dict__ for module in model.modules())
