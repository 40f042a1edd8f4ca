"""The measured gain of other weights in one group, compared with whole forwards of a model that holds them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glowq.calibration.weight_gains import measure_weights
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


def test_benefits_are_those_of_whole_forwards_with_the_weights(pair: tuple[nn.Module, nn.Module]) -> None:
    reference, model = pair
    groups = find_groups(model, {"input_ids": IDS})

    def weights(group: Group) -> dict[str, Tensor]:
        return {name: reference.get_submodule(name).weight.detach().double() for name in group.members}

    found = measure_weights(model, reference, groups, weights, IDS)
    wanted, plain = log_probabilities(reference), log_probabilities(model)
    assert list(found) == [group.name for group in groups]
    for group in groups:
        other = copy.deepcopy(model)
        for name in group.members:
            other.get_submodule(name).load_state_dict(reference.get_submodule(name).state_dict())
        benefit = kl(wanted, plain) - kl(wanted, log_probabilities(other))
        assert found[group.name].value == pytest.approx(float(benefit.mean()), rel=1e-3, abs=1e-7)
        spread = 2.5706 * float(benefit.mean(1).std()) / math.sqrt(len(IDS))  # Student's t, 5 degrees of freedom
        assert found[group.name].high - found[group.name].value == pytest.approx(spread, rel=2e-3)
    assert torch.equal(log_probabilities(model), plain)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_an_error_on_the_way_leaves_the_model_as_it_was(pair: tuple[nn.Module, nn.Module]) -> None:
    reference, model = pair
    groups = find_groups(model, {"input_ids": IDS})
    plain = log_probabilities(model)

    def misshaped(group: Group) -> dict[str, Tensor]:
        return dict.fromkeys(group.members, torch.zeros(3, 3))

    with pytest.raises(RuntimeError):
        measure_weights(model, reference, groups, misshaped, IDS)
    assert torch.equal(log_probabilities(model), plain)
    assert not any("forward" in module.__dict__ for module in model.modules())
