"""What is compared of two models' outputs, for every head; the oracle is the definition in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import ModelOutput

from glowq.errors import SensitivityError
from glowq.evaluation.divergence import answer, class_logits, divergences, final_states


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kl(first: Tensor, second: Tensor) -> Tensor:
    """Sum of p log(p / q) over the last dimension, p and q being softmaxes."""
    p, q = (part.double().exp() / part.double().exp().sum(-1, keepdim=True) for part in (first, second))
    return (p * (p / q).log()).sum(-1)


def found(first: Any, second: Any) -> Tensor:
    return divergences(answer(first), answer(second)).double()


@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 4)], ids=["tokens", "labels"])
def test_logits(shape: tuple[int, ...]) -> None:
    first, second = values(*shape), values(*shape, seed=1)
    expected = kl(first, second).flatten()
    torch.testing.assert_close(
        found(SimpleNamespace(logits=first), SimpleNamespace(logits=second)), expected, rtol=1e-5, atol=1e-6
    )


def test_the_labels_of_pixels() -> None:
    first, second = values(2, 5, 3, 4), values(2, 5, 3, 4, seed=1)
    expected = kl(first.permute(0, 2, 3, 1), second.permute(0, 2, 3, 1)).flatten()
    torch.testing.assert_close(
        found(SimpleNamespace(logits=first), SimpleNamespace(logits=second)), expected, rtol=1e-5, atol=1e-6
    )


def test_the_start_and_the_end_of_an_answer() -> None:
    first, second = ({"start_logits": values(2, 9, seed=n), "end_logits": values(2, 9, seed=n + 2)} for n in (0, 1))
    expected = torch.stack([kl(first[name], second[name]) for name in first], 1).flatten()
    torch.testing.assert_close(
        found(SimpleNamespace(**first), SimpleNamespace(**second)), expected, rtol=1e-5, atol=1e-6
    )


def test_one_value_chooses_between_yes_and_no() -> None:
    first, second = values(6, 1), values(6, 1, seed=1)
    p, q = first.double().sigmoid(), second.double().sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).flatten()
    torch.testing.assert_close(
        found(SimpleNamespace(logits=first), SimpleNamespace(logits=second)), expected, rtol=1e-5, atol=1e-6
    )


def test_other_values_are_compared_as_states() -> None:
    """A spectrum, and a film of 3 pictures."""
    output = ModelOutput(spectrogram=values(2, 7, 5), frames=values(2, 3, 4, 6, 6, seed=1), loss=torch.tensor(1.0))
    spectrum, frames = final_states(output)
    assert torch.equal(spectrum, output["spectrogram"])
    assert torch.equal(frames, output["frames"].reshape(2, 12, 36).transpose(1, 2))
    assert float(found(output, output).abs().max()) == 0


def test_what_holds_nothing_is_refused() -> None:
    assert class_logits(SimpleNamespace(logits=None)) is None
    with pytest.raises(SensitivityError, match="holds neither logits nor final states"):
        answer(ModelOutput(loss=torch.tensor(1.0)))
