"""Measure what more bits for one group gain, in the unit in which the gains of its ranks are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn.functional import linear

from ..factors.group import Group
from ..models.forward import replaced_forward
from .measured_changes import Change, measure_changes

__all__ = ["Weights", "measure_weights"]

_TOKENS = 512  # each group takes its own forwards

Weights = Callable[[str, tuple[int, int]], Tensor]
"""Function that takes a module's name and (out_features, in_features), and returns a weight of that shape."""


def measure_weights(
    model: nn.Module,
    reference: nn.Module,
    groups: Sequence[Group],
    plain: Weights,
    exact: Weights,
    wider: Weights | None,
    sequences: Tensor,
) -> dict[str, float]:
    """Measure what each group gains with other weights: by losing its error, less the change by the error left.

    Args:
        model: quantized model without a correction, which is the same afterwards.
        reference: full-precision model.
        groups: groups in the order in which the forward calls them.
        plain: weights of `model`, dequantized.
        exact: weights of the reference.
        wider: weights with more bits; None for those of the reference.
        sequences: token ids that are not calibrated on, shape (n, length), int64. Only the first 512 tokens are used.

    Returns:
        Group name -> gain in nats per token (for an encoder: squared distance per sequence), at least 0. It is an
        average over orders, see `Measured.gain`, as the gains of ranks are: they can be compared.

    Raises:
        SensitivityError: the models return neither logits nor final states.
    """

    def change(group: Group, name: str, after: Weights, before: Weights) -> Change:
        def applied(scale: float) -> Any:
            weights = {}
            for member, shape in group.shapes.items():
                base = plain(member, shape)
                weights[member] = base + scale * (after(member, shape).to(base) - before(member, shape).to(base))
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
