"""Measure what more bits for one group gain, in the unit in which the gains of its ranks are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn.functional import linear

from ..data.inputs import Samples
from ..errors import SensitivityError
from ..factors.group import Group
from ..models.forward import replaced_forward
from ..quantizers.experts import tensor_holder
from ..utils.timeline import stage
from .measured_changes import Change, measure_changes
from .path_gains import gains_along_path

__all__ = ["Weights", "measure_weights"]

_TOKENS = 512  # if each group takes its own forwards

Weights = Callable[[str, tuple[int, int]], Tensor]
"""Function that takes a module's name and (out_features, in_features), and returns a weight of that shape."""


@stage("measuring")
def measure_weights(
    model: nn.Module,
    reference: nn.Module,
    groups: Sequence[Group],
    plain: Weights,
    exact: Weights,
    wider: Weights | None,
    sequences: Samples,
) -> dict[str, float]:
    """Measure what each group gains with other weights, beside all others, as the gains of ranks are measured.

    All groups are measured together, see `gains_along_path`; or if the model has no gradient, one after the other.

    Args:
        model: quantized model without a correction, which is the same afterwards.
        reference: full-precision model.
        groups: groups in the order in which the forward calls them.
        plain: weights of `model`, dequantized.
        exact: weights of the reference.
        wider: weights with more bits; None for those of the reference.
        sequences: token ids that are not calibrated on, shape (n, length), int64.

    Returns:
        Group name -> gain in nats per token (for an encoder: squared distance per sequence), at least 0.

    Raises:
        SensitivityError: the models return neither logits nor final states.
    """
    changes = [_Wider(model, group, plain, exact if wider is None else wider) for group in groups]
    try:
        found = gains_along_path(model, reference, changes, sequences).parts
    except SensitivityError:
        return _one_by_one(model, reference, groups, plain, exact, wider, sequences)
    return {name: max(0.0, float(parts.mean())) for name, parts in found.items()}


@dataclass(frozen=True)
class _Wider:
    """Other weights of one group, see `PathChange`. They are read anew each time, because all take much memory."""

    model: nn.Module
    group: Group
    plain: Weights
    after: Weights

    def applied(self, strength: float) -> AbstractContextManager[Any]:
        @torch.no_grad()
        def weight(member: str) -> Tensor:
            before = self.plain(member, self.group.shapes[member])
            return before + strength * self._change(member, before)

        return _replaced(self.model, {member: partial(weight, member) for member in self.group.members})

    def added(self, member: str, x: Tensor) -> Tensor:
        change = self._change(member, self.plain(member, self.group.shapes[member]))
        return linear(x, change.to(x))

    def _change(self, member: str, before: Tensor) -> Tensor:
        return self.after(member, self.group.shapes[member]).to(before) - before


def _one_by_one(
    model: nn.Module,
    reference: nn.Module,
    groups: Sequence[Group],
    plain: Weights,
    exact: Weights,
    wider: Weights | None,
    sequences: Samples,
) -> dict[str, float]:
    """What each group gains by losing its error, less the change by the error that is left; on the first 512 tokens.

    It is an average over orders, see `Measured.gain`.
    """

    def change(group: Group, name: str, after: Weights, before: Weights) -> Change:
        def applied(scale: float) -> Any:
            weights = {}
            for member, shape in group.shapes.items():
                base = plain(member, shape)
                found = base + scale * (after(member, shape).to(base) - before(member, shape).to(base))
                weights[member] = partial(_itself, found)
            return _replaced(model, weights)

        return Change(name, group.block, applied)

    changes = []
    for group in groups:
        changes.append(change(group, f"{group.name} removed", exact, plain))
        if wider is not None:
            changes.append(change(group, f"{group.name} left", wider, exact))
    found = measure_changes(model, reference, changes, sequences[: max(1, _TOKENS // sequences.shape[1])])
    gains = {}
    for group in groups:
        removed, left = found[f"{group.name} removed"], found.get(f"{group.name} left")
        gains[group.name] = max(0.0, removed.gain - (0.0 if left is None else left.change))
    return gains


def _itself(weight: Tensor) -> Tensor:
    return weight


@contextmanager
def _replaced(model: nn.Module, weights: Mapping[str, Callable[[], Tensor]]) -> Iterator[None]:
    """Inside this context, the modules multiply by the weights that these functions return."""
    with ExitStack() as stack:
        for name, weight in weights.items():
            module = model.get_submodule(name)
            with align_module_device(tensor_holder(module)):
                bias: Any = getattr(module, "bias", None)
                bias = None if bias is None else bias.detach().clone()
            stack.enter_context(replaced_forward(module, partial(_multiply, weight, bias)))
        yield


def _multiply(weight: Callable[[], Tensor], bias: Tensor | None, x: Tensor) -> Tensor:
    return linear(x, weight().to(x), None if bias is None else bias.to(x))
