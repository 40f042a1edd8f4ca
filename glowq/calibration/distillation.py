"""A short distillation: the factors of a chosen correction learn to give the reference's answers together.

Each group was solved alone, as if the others' errors were none of its business. A few dozen steps of gradient descent
at the chosen ranks lets them make up for one another. No other parameter changes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..data.tokens import batches, split
from ..errors import CalibrationError, ConfigError, NonFiniteError, SensitivityError
from ..evaluation.divergence import answer, divergences
from ..factors.factors import GroupFactors
from ..models.checkpointing import is_large, recomputing
from ..models.forward import evaluating, to_model
from ..runtime.attach import attach, attached, detach
from ..runtime.container import SharedCorrection
from ..utils.logging import progress

__all__ = ["distill"]

_STEP_TOKENS = 2048
_BATCH_TOKENS = 512  # a backward pass keeps the activations of these
_RATE = 0.03  # of a factor's root mean square, at the first step; it falls to zero at the last
_HELD_OUT = 1 / 8


def distill(
    model: nn.Module,
    reference: nn.Module,
    factors: Sequence[GroupFactors],
    sequences: Tensor,
    *,
    steps: int,
    seed: int = 0,
) -> list[GroupFactors]:
    """Factors of the same shapes whose model's answers lie nearer to the reference's.

    An eighth of the sequences is held out; where the distilled factors do no better on it, the given ones are kept.

    Args:
        model: quantized, without a correction; left so.
        reference: the full-precision model.
        factors: those of the chosen ranks; gains and totals stay what they were before.
        sequences: token ids, shape (n, length), int64, n >= 2.
        steps: of `_STEP_TOKENS` tokens each, at least 1.
        seed: of the order of the sequences.

    Returns:
        Factors in the order and the dtypes given.

    Raises:
        ConfigError: steps is below 1.
        CalibrationError: fewer than two sequences.
        SensitivityError: the base's kernels let no gradient through, or the models give out nothing comparable.
        NonFiniteError: the divergence is NaN or Inf.
    """
    if steps < 1:
        raise ConfigError(f"distillation takes at least 1 step, found {steps}.")
    if not factors:
        return []
    if len(sequences) < 2:
        raise CalibrationError(f"distillation needs 2 calibration sequences or more, found {len(sequences)}.")
    train, held = split(sequences, _HELD_OUT, seed)
    with _learning(model, reference, factors) as containers:
        before = _held_out(model, reference, held)
        _descend(model, reference, containers, train, steps, seed)
        after = _held_out(model, reference, held)
        learned = [_read(entry, containers[entry.group.name]) for entry in factors]
    return learned if after < before else list(factors)


def _descend(
    model: nn.Module,
    reference: nn.Module,
    containers: Mapping[str, SharedCorrection],
    sequences: Tensor,
    steps: int,
    seed: int,
) -> None:
    learned = [parameter for container in containers.values() for parameter in container.parameters()]
    # Adam moves every value by about its rate: a share of what a factor's values are moves large and small ones alike.
    rates = [_RATE * float(parameter.detach().square().mean().sqrt()) for parameter in learned]
    descent = torch.optim.Adam(
        [{"params": [parameter], "lr": rate} for parameter, rate in zip(learned, rates, strict=True)], betas=(0.9, 0.95)
    )
    schedule = LambdaLR(descent, lambda step: 1 - step / steps)
    order = _order(len(sequences), seed)
    count = max(1, _STEP_TOKENS // sequences.shape[1])
    called: set[str] = set()
    with ExitStack() as stack:
        bar = stack.enter_context(progress(total=steps, desc="Distilling", unit="step"))
        if is_large(model, batches(sequences[: _batch_size(sequences)], _batch_size(sequences))):
            stack.enter_context(recomputing(model))
        for name, container in containers.items():
            stack.callback(container.right.register_forward_hook(lambda *_, name=name: called.add(name)).remove)
        for _ in range(steps):
            chosen = sequences[[next(order) for _ in range(count)]]
            descent.zero_grad()
            for batch in batches(chosen, _batch_size(sequences)):
                loss = _loss(model, reference, batch) * (len(batch["input_ids"]) / count)
                loss.backward()
            _check_reached({name: containers[name] for name in called})
            descent.step()
            schedule.step()
            bar.update()


def _loss(model: nn.Module, reference: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        wanted = answer(reference(**to_model(batch, reference)))
    given = answer(model(**to_model(batch, model)))
    loss = divergences([part.to(given[0].device) for part in wanted], given).mean()
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError("the divergence from the reference is NaN or Inf: one of the models gives out no numbers.")
    return loss


def _held_out(model: nn.Module, reference: nn.Module, sequences: Tensor) -> float:
    with torch.no_grad():
        found = batches(sequences, _batch_size(sequences))
        return sum(float(_loss(model, reference, batch)) * len(batch["input_ids"]) for batch in found)


@contextmanager
def _learning(
    model: nn.Module, reference: nn.Module, factors: Sequence[GroupFactors]
) -> Iterator[dict[str, SharedCorrection]]:
    """Group name -> container whose float32 factors, alone in the model, take gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(evaluating(reference))
        for parameter in trained:
            stack.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        stack.callback(detach, model)
        for entry in factors:
            attach(model, _copied(entry)).requires_grad_()
        yield attached(model)


def _check_reached(containers: Mapping[str, SharedCorrection]) -> None:
    for name, container in containers.items():
        if any(parameter.grad is None for parameter in container.parameters()):
            raise SensitivityError(
                f"{name}: no gradient reaches its factors, because the base's kernels let none through. Correct this "
                "model without distillation."
            )


def _copied(entry: GroupFactors) -> GroupFactors:
    """In float32, not in int8, and in memory of its own: the given factors stay what they are."""
    lefts = {name: left.float().clone() for name, left in entry.lefts.items()}
    return replace(entry, right=entry.right.float().clone(), lefts=lefts, int8=False)


def _read(entry: GroupFactors, container: SharedCorrection) -> GroupFactors:
    def stored(factor: Any, like: Tensor) -> Tensor:
        return factor.factor.detach().to(like.device, like.dtype, copy=True)

    lefts = zip(entry.lefts.items(), container.lefts, strict=True)
    return replace(
        entry,
        right=stored(container.right, entry.right),
        lefts={member: stored(factor, left) for (member, left), factor in lefts},
        int8=False,
    )


def _order(count: int, seed: int) -> Iterator[int]:
    """Every sequence once, then every one once more in another order, and so on."""
    draw = random.Random(seed)
    while True:
        yield from draw.sample(range(count), count)


def _batch_size(sequences: Tensor) -> int:
    return max(1, _BATCH_TOKENS // sequences.shape[1])
