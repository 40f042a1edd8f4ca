"""Measure how other weights in one group alone change the outputs of the quantized model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn.functional import linear

from ..evaluation.intervals import Interval, mean_interval, text_parts
from ..factors.group import Group
from ..models.forward import replaced_forward
from ..utils.logging import progress
from ..utils.timeline import stage
from .block_replay import replaying, steps_of

__all__ = ["measure_weights"]

Weights = Callable[[Group], Mapping[str, Tensor]]


@stage("measuring wider weights")
def measure_weights(
    model: nn.Module, reference: nn.Module, groups: Sequence[Group], weights: Weights, sequences: Tensor
) -> dict[str, Interval]:
    """Give the members of one group at a time other weights, and compare the outputs with those of the reference.

    Args:
        model: quantized model without a correction, which is the same afterwards.
        reference: full-precision model.
        groups: groups in the order in which the forward calls them.
        weights: function that returns member name -> weight, shape (out_features, in_features), any float dtype; called
            once for every group and batch.
        sequences: token ids, shape (n, length), int64.

    Returns:
        Group name -> decrease of the divergence from the reference, in nats per token (for an encoder: in squared
        distance per sequence), with its 95% interval over parts of 32 tokens.

    Raises:
        SensitivityError: the models return neither logits nor final states.
    """
    found: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    blocks = [group.block for group in groups]
    with (
        replaying(model, reference, blocks, sequences) as replays,
        progress(total=steps_of(sequences) * len(groups), desc="Measuring wider weights", unit="group") as bar,
    ):
        for replay in replays:
            for group in groups:
                given = replay.answer(group.block, _replaced(model, weights(group)))
                found[group.name].append(replay.benefits(given))
                bar.update()
    return {name: mean_interval(text_parts(torch.cat(parts))) for name, parts in found.items()}


@contextmanager
def _replaced(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside this context, the modules multiply by these weights."""
    with ExitStack() as stack:
        for name, weight in weights.items():
            module = model.get_submodule(name)
            with align_module_device(module):
                bias: Any = getattr(module, "bias", None)
                bias = None if bias is None else bias.detach().clone()
            stack.enter_context(replaced_forward(module, partial(_multiply, weight, bias)))
        yield


def _multiply(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return linear(x, weight.to(x), None if bias is None else bias.to(x))
