"""Measure what a change of every group is worth beside all others, with one backward pass for all groups.

A change is a correction, or other weights. All are made with a strength t from 0 to 1, and the divergence from the
reference falls on the way. Its derivative by the strength of one group is that group's part at t. The mean of this part
over the way is what the group is worth: these gains add up to what all changes gain together (the Aumann-Shapley
value). Two points of Gauss-Legendre quadrature give the mean exactly where the divergence is a polynomial of degree 4
in t.

Source: Aumann and Shapley, Values of Non-Atomic Games (1974); Integrated Gradients (arXiv 1703.01365) for models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..data.inputs import Samples, batches, rows_of_samples
from ..errors import SensitivityError
from ..evaluation.divergence import answer, class_logits, divergences, kl_gradient
from ..factors.group import Group
from ..factors.units import GainUnit
from ..models.checkpointing import is_large, recomputing
from ..models.forward import differentiable, evaluating, to_model
from ..utils.logging import progress

__all__ = ["PathChange", "PathGains", "gains_along_path"]

_BATCH_TOKENS = 512  # a backward pass keeps the activations of this many tokens
_POINTS = (0.5 - math.sqrt(1 / 12), 0.5 + math.sqrt(1 / 12))  # both have the weight 1/2


class PathChange(Protocol):
    """A change of all modules of one group."""

    @property
    def group(self) -> Group:
        """The group."""

    def applied(self, strength: float) -> AbstractContextManager[Any]:
        """A context inside of which the model has the change times `strength`."""

    def added(self, member: str, x: Tensor) -> Tensor:
        """What the change with the strength 1 adds to the output of a module.

        Args:
            member: name of the module.
            x: its inputs, shape (n, d), float32.

        Returns:
            Shape (n, o), float32.
        """


class PathGains(NamedTuple):
    """The gains of all groups.

    Attributes:
        parts: group name -> gain by what each token's output contributes to it, float64 on the CPU, shape (n, length),
            whose mean is the gain in nats per token. For an encoder, shape (n, 1), squared distance per sequence. For
            samples that are no sequences of one length, shape (n, 1), nats per token of each.
        before: mean divergence of the model without a correction from the reference, in the same unit.
        unit: NATS, or SQUARED_DISTANCE for an encoder.
    """

    parts: dict[str, Tensor]
    before: float
    unit: GainUnit


def gains_along_path(
    model: nn.Module, reference: nn.Module, changes: Sequence[PathChange], sequences: Samples
) -> PathGains:
    """Measure the gain of every group.

    Args:
        model: quantized model without a correction. It is unchanged afterwards.
        reference: full-precision model.
        changes: one change for each group.
        sequences: token ids that nothing was calibrated on, shape (n, length), int64, or samples of another kind.

    Raises:
        SensitivityError: the models return neither logits nor final states; or no finite gradient reaches a group, as
            with layers that round their inputs.
    """
    groups = [_GroupPart(change) for change in changes]
    parts: dict[str, list[Tensor]] = {change.group.name: [] for change in changes}
    unit, before = GainUnit.NATS, []
    inputs = list(batches(sequences, max(1, _BATCH_TOKENS // sequences.shape[1])))
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(evaluating(model))
        stack.enter_context(evaluating(reference))
        bar = stack.enter_context(progress(total=len(inputs) * len(_POINTS), desc="Measuring", unit="batch"))
        for batch in inputs:
            with torch.no_grad():
                wanted = answer(reference(**to_model(batch, reference)))
                plain = answer(model(**to_model(batch, model)))
                apart = divergences([one.to(plain[0].device) for one in wanted], plain).double().cpu()
            rows = rows_of_samples(apart, batch, sequences)
            before.append(rows.flatten())
            shape = batch["input_ids"].shape if isinstance(sequences, Tensor) else rows.shape
            per_answer = shape.numel() / len(apart)  # the parts are summed over answers, and averaged over the shape
            for part in groups:
                part.start(shape)
            for strength in _POINTS:
                unit = _backward(model, wanted, to_model(batch, model), groups, strength)
                bar.update()
            for part in groups:
                found = part.finish() / len(_POINTS)
                is_nats = unit is GainUnit.NATS
                parts[part.name].append(found * per_answer if is_nats else found.sum(1, keepdim=True))
    return PathGains({name: torch.cat(found) for name, found in parts.items()}, float(torch.cat(before).mean()), unit)


def _backward(
    model: nn.Module, wanted: list[Tensor], batch: Mapping[str, Any], groups: Sequence[_GroupPart], strength: float
) -> GainUnit:
    """Run the model with all changes at one strength, and let every group add its part."""
    with ExitStack() as stack:
        for part in groups:  # before corrections, whose sum has a gradient even if the layer's own output has none
            part.watch(model, stack)
        for part in groups:
            stack.enter_context(part.change.applied(strength))
        stack.enter_context(differentiable(model))
        if is_large(model, [batch]):
            stack.enter_context(recomputing(model))
        with torch.enable_grad():
            output = model(**batch)
            logits = class_logits(output)
            start = logits
            if logits is None:
                given = answer(output)
                start = divergences([part.to(given[0].device) for part in wanted], given).sum()
        if start is None or not start.requires_grad:
            raise SensitivityError(f"no gradient flows from the inputs of {type(model).__name__} to its output.")
        start.backward(None if logits is None else kl_gradient(wanted[0].to(logits.device), logits.detach()))
    return GainUnit.SQUARED_DISTANCE if logits is None else GainUnit.NATS


class _GroupPart:
    """Sums one group's part of the derivative for every token of a batch."""

    def __init__(self, change: PathChange) -> None:
        self.name = change.group.name
        self.change = change
        self._input: Tensor | None = None
        self._was_called = self._has_gradient = False
        self._sum = torch.zeros(0)
        self._shape = torch.Size()

    def watch(self, model: nn.Module, stack: ExitStack) -> None:
        """Watch the group's input and the gradients at its outputs until the stack is closed."""
        members = [model.get_submodule(name) for name in self.change.group.members]
        stack.callback(members[0].register_forward_pre_hook(self._keep_input).remove)
        for name, member in zip(self.change.group.members, members, strict=True):
            stack.callback(member.register_forward_hook(self._hook(name)).remove)

    def start(self, shape: torch.Size) -> None:
        """Start a batch of ids of this shape, (batch, length)."""
        self._sum, self._shape = torch.zeros(shape.numel(), dtype=torch.float64), shape

    def finish(self) -> Tensor:
        """The sums of the batch, shape (batch, length).

        Raises:
            SensitivityError: no gradient has reached the group although it was called, or one that is not finite.
        """
        if self._was_called > self._has_gradient or not bool(torch.isfinite(self._sum).all()):
            raise SensitivityError(f"{self.name}: no finite gradient of the divergence reaches its outputs.")
        return self._sum.reshape(self._shape)

    def _keep_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._input = args[0].detach()
        self._was_called = self._was_called or self._input.numel() > 0  # an expert may get no token

    def _hook(self, member: str) -> Callable[[nn.Module, Any, Any], None]:
        def watch(module: nn.Module, args: Any, output: Any) -> None:
            x = self._input
            if x is not None and isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda gradient: self._add(member, x, gradient))

        return watch

    def _add(self, member: str, x: Tensor, gradient: Tensor | None) -> None:
        if gradient is None:  # a later kernel computes none
            return
        rows = gradient.detach().flatten(0, -2).float()
        self._has_gradient = self._has_gradient or bool(rows.any())
        parts = -(rows * self.change.added(member, x.flatten(0, -2).float())).sum(1).double().cpu()
        tokens = len(self._sum)
        if len(parts) == tokens:
            self._sum += parts
        else:  # the rows are not the tokens, as in an expert: each counts for a token that is about as far in the text
            self._sum.index_add_(0, torch.arange(len(parts)) * tokens // max(1, len(parts)), parts)
