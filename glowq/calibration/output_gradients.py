"""Second moment of the loss gradient at each group's outputs: how sensitive the loss is to an error of the outputs.

One backward pass over the calibration tokens measures every group at once. The labels are drawn from a softmax, not
taken from the text, so that the moment G is the Fisher information: an output error d increases the loss by d^T G d / 2
nats.

Source: K-FAC (arXiv 1503.05671) for the Kronecker-factored Fisher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError, SensitivityError
from ..evaluation.divergence import answer, class_logits, final_states
from ..factors.group import Group
from ..models.checkpointing import is_large, recomputing
from ..models.forward import differentiable, evaluating
from ..quantizers.model import quantized_modules
from ..solving.moments import OutputMoment
from ..utils.logging import progress
from ..utils.timeline import stage
from .gradient_sums import SKETCH_RANK, GradientProduct, GradientSketch
from .pooled_moments import families

__all__ = ["FULL_WIDTH", "output_moments"]

_BROKEN = "The model itself is broken: check that it generates, or load it in another dtype."
FULL_WIDTH = 4096  # a group with more outputs gets a diagonal plus a low-rank part as its moment, not a matrix

Batch = Mapping[str, Any]


@stage("gradients")
def output_moments(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    *,
    seed: int = 0,
    full_width: int = FULL_WIDTH,
    checkpoint: bool | None = None,
) -> dict[str, OutputMoment]:
    """Measure the second moment G = E[g g^T] of the loss gradient g at each group's stacked outputs, per token.

    Args:
        model: a model that chooses among tokens or labels, or an encoder, whose final states are used in place of
            logits. Its parameters, modes and hooks are restored afterwards.
        groups: groups of the model.
        batches: keyword arguments of one forward each; every token counts.
        seed: seed of the labels and of the random directions of wide groups.
        full_width: largest number of outputs O for which a group's moment is a matrix.
        checkpoint: whether the backward pass runs each block again. This takes the time of one more forward, and keeps
            only the inputs of the blocks in memory. None does it if a batch would keep more than 1 GiB. The moments are
            the same.

    Returns:
        Group name -> float32 tensor of shape (O, O). If O is above `full_width`, a diagonal plus a low-rank part of 256
        directions. The unit is nats (for an encoder: squared distance of normalized states) per squared output unit.
        Groups whose outputs the model does not use are left out, such as the last layer of an image tower from which a
        vision-language model takes the layer before; and experts that get no token where others of their layer do.

    Raises:
        SensitivityError: the model's output has no gradient, or no gradient reaches a group.
        NonFiniteError: the output, or a gradient, is NaN or Inf; the message names the module.
    """
    sums = [_GroupGradient(group, full_width, seed) for group in groups]
    if checkpoint is None:
        checkpoint = is_large(model, batches)
    generator = torch.Generator().manual_seed(seed)
    tokens = 0
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(evaluating(model))
        stack.enter_context(differentiable(model))
        if checkpoint:
            stack.enter_context(recomputing(model))
        for entry in sums:
            for index, member in enumerate(entry.group.members):
                handle = model.get_submodule(member).register_forward_hook(entry.hook(index))
                stack.callback(handle.remove)
        bar = stack.enter_context(progress(total=len(batches), desc="Gradients", unit="batch"))
        for batch in batches:
            tokens += _backward(model, batch, generator)
            bar.update()
        spared = _spared(sums)
        unreached = [entry for entry in sums if not entry.was_reached]
        unused = {one.group.name for one in unreached if one.group.name in spared or _is_unused(model, one, batches[0])}
    if len(unused) == len(sums):
        unused = set()  # the error of the first of them is raised below
    return {entry.group.name: entry.moment(tokens) for entry in sums if entry.group.name not in unused}


def _spared(sums: Sequence[_GroupGradient]) -> set[str]:
    """Names of the experts that no token reached, where tokens reached others of their layer."""
    of_group = {entry.group.name: entry for entry in sums}
    found: set[str] = set()
    for family in families([entry.group for entry in sums]):
        members = [of_group[group.name] for group in family]
        if any(entry.was_reached for entry in members):
            found.update(entry.group.name for entry in members if not entry.was_computed)
    return found


def _is_unused(model: nn.Module, entry: _GroupGradient, batch: Batch) -> bool:
    """Whether the model computes a group's outputs, and answers the same, bit for bit, with others in their place."""
    computed = set()

    def changed(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if output.numel():  # an expert may get no token
                computed.add(name)
            return 2 * output + 1

        return change

    with torch.no_grad(), ExitStack() as stack:
        expected = answer(model(**batch))
        for name in entry.group.members:
            stack.callback(model.get_submodule(name).register_forward_hook(changed(name)).remove)
        found = answer(model(**batch))
    same = all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    return same and computed == set(entry.group.members)


def _backward(model: nn.Module, batch: Batch, generator: torch.Generator) -> int:
    """Run one forward and one backward pass, and return the number of tokens."""
    with torch.enable_grad():
        output = model(**batch)
        logits = class_logits(output)
        start, tokens = _projections(output, generator) if logits is None else (logits, logits[..., 0].numel())
    if not start.requires_grad:
        raise SensitivityError(f"no gradient flows from the inputs of {type(model).__name__} to its output.")
    gradient = None
    if logits is not None:
        gradient = _label_gradient(logits.detach(), generator)
    if not bool(torch.isfinite(start.detach() if gradient is None else gradient.sum())):
        raise NonFiniteError(f"{_first_broken(model, batch)} holds NaN or Inf during calibration. {_BROKEN}")
    start.backward(gradient)
    return tokens


def _label_gradient(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw labels from a softmax, and return the gradient of their cross entropy, summed over tokens, at the logits.

    The gradient is the softmax minus one at the label, so that one softmax serves for the labels and the gradient.

    Args:
        logits: shape (batch, ..., classes).
    """
    chances = logits.float().softmax(-1)
    sums = chances.cumsum(-1)
    height = torch.rand(*sums.shape[:-1], 1, generator=generator).to(sums.device) * sums[..., -1:]
    labels = torch.searchsorted(sums, height, right=True).clamp_max(sums.shape[-1] - 1)
    minus = chances.new_full((), -1.0).expand(labels.shape)
    return chances.scatter_add_(-1, labels.to(chances.device), minus).to(logits.dtype)


def _projections(output: Any, generator: torch.Generator) -> tuple[Tensor, int]:
    """Return the sum of `_projection` over an encoder's final states, and the number of tokens."""
    states = final_states(output)
    return torch.stack([_projection(state, generator) for state in states]).sum(), states[0][..., 0].numel()


def _projection(states: Tensor, generator: torch.Generator) -> Tensor:
    """Scale the final states to length 1, and return the sum of their products with random directions.

    The second moment of the gradients of this sum is the Gauss-Newton matrix.

    Args:
        states: states of the tokens, shape (batch, length, width), or pooled states, shape (batch, width).
    """
    directions = torch.randn(states.shape, generator=generator).to(states.device)
    return (nn.functional.normalize(states.float(), dim=-1) * directions).sum()


def _first_broken(model: nn.Module, batch: Batch) -> str:
    """Describe the first tensor that holds NaN or Inf, for a message."""
    found: list[str] = []
    with ExitStack() as stack, torch.no_grad():
        for name in quantized_modules(model):

            def watch(module: nn.Module, args: Any, name: str = name) -> None:
                if not found and not bool(torch.isfinite(args[0]).all()):
                    found.append(f"{name}: its input")

            stack.callback(model.get_submodule(name).register_forward_pre_hook(watch).remove)
        model(**batch)
    return found[0] if found else f"the output of {type(model).__name__}"


class _GroupGradient:
    """Sums one group's output gradients; the gradients of all members of a forward are added together."""

    def __init__(self, group: Group, full_width: int, seed: int) -> None:
        self.group = group
        self.was_computed = False  # an expert may get no token
        self._is_wide = sum(group.out_features) > full_width
        self._seed = seed
        self._parts: dict[int, Tensor] = {}
        self._sum: GradientProduct | GradientSketch | None = None

    def hook(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        """Return the forward hook of member number `index`."""

        def watch(module: nn.Module, args: Any, output: Any) -> None:
            self.was_computed = self.was_computed or (isinstance(output, Tensor) and output.numel() > 0)
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda gradient: self._add(index, gradient))

        return watch

    def _add(self, index: int, gradient: Tensor | None) -> None:
        if gradient is None:  # a later kernel computes none
            return
        self._parts[index] = gradient.detach().flatten(0, -2)
        if len(self._parts) < len(self.group.members):
            return
        rows = torch.cat([self._parts[number] for number in range(len(self._parts))], dim=-1)
        self._parts.clear()
        if self._sum is None:
            sketch = (rows.shape[1], SKETCH_RANK, self._seed, rows.device)
            self._sum = GradientSketch(*sketch) if self._is_wide else GradientProduct(rows.shape[1], rows.device)
        self._sum.add(rows)

    @property
    def was_reached(self) -> bool:
        """Whether a gradient has reached all outputs, and not only zeros."""
        return self._sum is not None and bool(self._sum.diagonal.any())

    def moment(self, tokens: int) -> OutputMoment:
        where = self.group.members[0]
        if self._sum is None:
            raise SensitivityError(f"{where}: no gradient of the loss reaches its output.")
        diagonal = self._sum.diagonal
        # A gradient that is not finite makes its entry of the diagonal not finite: checking the diagonal is enough.
        if not bool(torch.isfinite(diagonal).all()):
            raise NonFiniteError(f"{where}: the gradient of the loss at its output holds NaN or Inf.")
        if not bool(diagonal.any()):
            raise SensitivityError(f"{where}: the gradient of the loss at its output is zero everywhere.")
        done, self._sum = self._sum, None
        return done.moment(tokens)
