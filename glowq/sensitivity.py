"""How much the loss minds an error at each group's outputs: the second moment of the loss gradient there.

One backward pass over the calibration tokens measures every group at once. Labels are drawn from a softmax, not taken
from the text, so that the moment is the Fisher information: half of d^T G d is what an output error d costs, in nats.

Source: method.md, two-sided weighting; K-FAC (arXiv 1503.05671) for the Kronecker-factored Fisher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .backends import quantized_modules
from .errors import NonFiniteError, SensitivityError
from .groups import Group, evaluating
from .progress import progress
from .statistics import BROKEN, bfloat16_products

__all__ = ["FULL_WIDTH", "output_moments"]

FULL_WIDTH = 4096  # outputs up to which a group's moment is a matrix; beyond, its diagonal

Batch = Mapping[str, Any]
Teacher = Callable[[Batch], Tensor]


def output_moments(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    *,
    teacher: Teacher | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Second moment G = E[g g^T] of the loss gradient g at each group's stacked outputs, per token.

    Args:
        model: a language model, or an encoder, whose token states take the place of the logits; its parameters,
            modes and hooks are left as they were.
        groups: groups of the model.
        batches: keyword arguments of one forward each; every token counts.
        teacher: batch -> logits whose softmax the labels are drawn from; the model's own unless given.
        seed: of the labels.

    Returns:
        Group name -> float32 tensor of shape (O, O), or (O,), its diagonal, where O is above `FULL_WIDTH`; in nats
        (of an encoder: in squared distance of normalized states) per squared output unit.

    Raises:
        SensitivityError: the model's output has no gradient, or none reaches a group.
        NonFiniteError: the output, or a gradient, is NaN or Inf; the message names the module.
    """
    sums = [_GroupGradient(group) for group in groups]
    generator = torch.Generator().manual_seed(seed)
    tokens = 0
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(evaluating(model))
        stack.enter_context(_differentiable(model))
        for entry in sums:
            for index, member in enumerate(entry.group.members):
                handle = model.get_submodule(member).register_forward_hook(entry.hook(index))
                stack.callback(handle.remove)
        bar = stack.enter_context(progress(total=len(batches), desc="Gradients", unit="batch"))
        for batch in batches:
            tokens += _backward(model, batch, teacher, generator)
            bar.update()
    return {entry.group.name: entry.moment(tokens) for entry in sums}


def _backward(model: nn.Module, batch: Batch, teacher: Teacher | None, generator: torch.Generator) -> int:
    """One forward and one backward pass; returns the number of tokens."""
    with torch.enable_grad():
        output = model(**batch)
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor) and logits.dim() == 3:
            drawn_from = logits if teacher is None else teacher(batch)
            loss = _surprise(logits, drawn_from.detach(), generator)
            tokens = logits.shape[0] * logits.shape[1]
        else:
            states = [getattr(output, name, None) for name in ("last_hidden_state", "pooler_output")]
            found = [state for state in states if isinstance(state, Tensor)]
            if not found:
                raise SensitivityError(f"{type(model).__name__} returns neither token logits nor final states.")
            loss = torch.stack([_projection(state, generator) for state in found]).sum()
            tokens = found[0][..., 0].numel()
        if not loss.requires_grad:
            raise SensitivityError(f"no gradient flows from the embeddings of {type(model).__name__} to its output.")
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"{_first_broken(model, batch)} holds NaN or Inf during calibration. {BROKEN}")
        loss.backward()
    return tokens


def _surprise(logits: Tensor, drawn_from: Tensor, generator: torch.Generator) -> Tensor:
    """Cross entropy of labels drawn from a softmax, summed over tokens; logits of shape (batch, length, vocabulary)."""
    chances = drawn_from.float().softmax(-1).flatten(0, 1).cpu()
    finite = chances.nan_to_num(1.0)  # the loss of what is not finite is not finite either, and says so
    labels = torch.multinomial(finite, 1, generator=generator)[:, 0].to(logits.device)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum")


def _projection(states: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction of every final state, scaled to length 1: its gradients make the Gauss-Newton moment.

    Args:
        states: of the tokens, shape (batch, length, width), or pooled, shape (batch, width).
    """
    directions = torch.randn(states.shape, generator=generator).to(states.device)
    return (nn.functional.normalize(states.float(), dim=-1) * directions).sum()


def _first_broken(model: nn.Module, batch: Batch) -> str:
    """What the first tensor that is not finite is, in words."""
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
    """Adds up one group's output gradients, as soon as those of all members of one forward have come."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._parts: dict[int, Tensor] = {}
        self._sum: Tensor | None = None

    def hook(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        """Forward hook of member number `index`."""

        def watch(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda gradient: self._add(index, gradient))

        return watch

    def _add(self, index: int, gradient: Tensor) -> None:
        self._parts[index] = gradient.detach().flatten(0, -2)
        if len(self._parts) < len(self.group.members):
            return
        rows = torch.cat([self._parts[number] for number in range(len(self._parts))], dim=-1)
        self._parts.clear()
        single = rows.float()
        if rows.shape[1] > FULL_WIDTH:
            product = single.square().sum(0)
        else:
            with bfloat16_products(rows.dtype):
                product = single.T @ single
        # In float32: a matrix a group is held until the walk is over, and labels are drawn at random anyway.
        self._sum = product if self._sum is None else self._sum.add_(product)

    def moment(self, tokens: int) -> Tensor:
        where = self.group.members[0]
        if self._sum is None:
            raise SensitivityError(f"{where}: no gradient of the loss reaches its output.")
        if not bool(torch.isfinite(self._sum).all()):
            raise NonFiniteError(f"{where}: the gradient of the loss at its output holds NaN or Inf.")
        if not bool(self._sum.any()):
            raise SensitivityError(f"{where}: the gradient of the loss at its output is zero everywhere.")
        return self._sum / tokens


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Gradients flow from the embeddings on, and into no parameter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if not isinstance(embeddings, nn.Module):
        raise SensitivityError(f"{type(model).__name__} has no input embeddings that a gradient could flow from.")
    handle = embeddings.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
