"""A short distillation: the factors of a correction are trained together to reproduce the outputs of the reference.

The solver treats each group alone and ignores the errors of the other groups. A few dozen steps of gradient descent at
the chosen ranks let the groups compensate for each other's errors. No other parameter changes.

Factors that will be rounded are trained as they will be used: every step computes with rounded factors, and applies the
gradient of the rounded values to the unrounded ones (a straight-through estimator, arXiv 1308.3432).
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

from ..data.inputs import Samples, batches, size_of, split
from ..errors import CalibrationError, ConfigError, NonFiniteError, SensitivityError
from ..evaluation.divergence import answer, divergences
from ..factors.factors import GroupFactors
from ..factors.integers import round_factors
from ..factors.rounding import round_group
from ..models.checkpointing import is_large, recomputing
from ..models.forward import evaluating, to_model
from ..runtime.attach import attach, attached, detach
from ..runtime.container import SharedCorrection
from ..utils.logging import progress
from ..utils.timeline import stage

__all__ = ["distill"]

_STEP_TOKENS = 2048
_BATCH_TOKENS = 512  # a backward pass keeps the activations of this many tokens
_RATE = 0.03  # learning rate of the first step, as a share of a factor's root mean square; it falls linearly to zero
_HELD_OUT = 1 / 8  # share of the sequences
_ROUND = 10  # steps between two looks at the held-out sequences, if these decide how many steps are taken
_MOST_ROUNDS = 3  # 30 steps take about twice as long as the correction before them
_LEAST = 0.02  # share of the held-out divergence that a round must take away, or it is the last


@stage("distilling")
def distill(
    model: nn.Module,
    reference: nn.Module,
    factors: Sequence[GroupFactors],
    sequences: Samples,
    *,
    steps: int | str,
    bits: int | None = None,
    seed: int = 0,
) -> tuple[list[GroupFactors], int]:
    """Train factors so that the outputs of the corrected model come closer to those of the reference.

    An eighth of the sequences is held out. If the trained factors are not better on it, the given factors are returned,
    rounded to `bits`.

    Args:
        model: quantized model without a correction. It has no correction afterwards.
        reference: full-precision model.
        factors: factors at the chosen ranks. Training does not change their gains and totals.
        sequences: token ids, shape (n, length), int64, n >= 2.
        steps: number of steps, at least 1; each uses about `_STEP_TOKENS` tokens. "auto" takes up to `_MOST_ROUNDS`
            times `_ROUND` steps, and stops as soon as `_ROUND` of them gain little on the held-out sequences.
        bits: what the factors are rounded to, see `GroupFactors`; None for floats.
        seed: seed of the choice of held-out sequences and of the order of the others.

    Returns:
        Factors with the shapes, order and dtypes of the given ones, on the grid of `bits`; and the number of steps that
        they were trained for, 0 if they are the given ones.

    Raises:
        ConfigError: steps is below 1, or a word other than "auto".
        CalibrationError: there are fewer than two sequences.
        SensitivityError: the kernels of the base compute no gradient, or the models return neither logits nor final
            states.
        NonFiniteError: the divergence is NaN or Inf.
    """
    rounds = [_ROUND] * _MOST_ROUNDS if steps == "auto" else [steps]
    if not all(isinstance(count, int) and count >= 1 for count in rounds):
        raise ConfigError(f"distillation takes at least 1 step, found {steps}.")
    if not factors:
        return [], 0
    if len(sequences) < 2:
        raise CalibrationError(f"distillation needs 2 calibration sequences or more, found {len(sequences)}.")
    train, held = split(sequences, _HELD_OUT, seed)
    with _learning(model, reference, factors) as containers:
        values, order = _Values(list(containers.values()), bits), _order(len(train), seed)
        values.use()
        given = list(factors) if bits is None else [round_group(entry, bits) for entry in factors]
        best, taken = given, 0
        divergence = _held_out(model, reference, held)
        for count in map(int, rounds):
            _descend(model, reference, containers, values, train, count, order)
            before, divergence = divergence, _held_out(model, reference, held)
            if divergence >= before:
                break
            best, taken = [_read(entry, containers[entry.group.name]) for entry in given], taken + count
            if divergence > (1 - _LEAST) * before:
                break
    return best, taken


def _descend(
    model: nn.Module,
    reference: nn.Module,
    containers: Mapping[str, SharedCorrection],
    values: _Values,
    sequences: Samples,
    steps: int,
    order: Iterator[int],
) -> None:
    learned = values.learned
    # Adam changes every value by about the learning rate. A rate in proportion to the values of a factor changes large
    # and small factors by the same share.
    rates = [_RATE * float(parameter.detach().square().mean().sqrt()) for parameter in learned]
    descent = torch.optim.Adam(
        [{"params": [parameter], "lr": rate} for parameter, rate in zip(learned, rates, strict=True)], betas=(0.9, 0.95)
    )
    schedule = LambdaLR(descent, lambda step: 1 - step / steps)
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
            values.forget()
            for batch in batches(chosen, _batch_size(sequences)):
                loss = _loss(model, reference, batch) * (size_of(batch) / count)
                loss.backward()
            _check_reached({name: containers[name] for name in called})
            values.take_gradients()
            descent.step()
            values.use()
            schedule.step()
            bar.update()


class _Values:
    """The values that are trained: the factors of the containers, or unrounded copies of them.

    Attributes:
        learned: the tensors that an optimizer changes.
    """

    def __init__(self, containers: Sequence[SharedCorrection], bits: int | None) -> None:
        self._containers, self._bits = containers, bits
        self._used = [parameter for container in containers for parameter in container.parameters()]
        self.learned = self._used if bits is None else [part.detach().clone() for part in self._used]

    def forget(self) -> None:
        """Forget the gradients of the last step."""
        for parameter in self._used:
            parameter.grad = None

    def take_gradients(self) -> None:
        """Give the gradients of the factors to the values that are trained."""
        for value, parameter in zip(self.learned, self._used, strict=True):
            value.grad = parameter.grad

    def use(self) -> None:
        """Let the containers compute with the values, rounded."""
        if self._bits is None:
            return
        values = iter(self.learned)
        with torch.no_grad():
            for container in self._containers:
                right, *lefts = [next(values) for _ in container.parameters()]
                named = dict(zip(container.group.members, lefts, strict=True))
                found, others = round_factors(right, named, self._bits)
                for parameter, value in zip(container.parameters(), (found, *others.values()), strict=True):
                    parameter.copy_(value)


def _loss(model: nn.Module, reference: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        wanted = answer(reference(**to_model(batch, reference)))
    given = answer(model(**to_model(batch, model)))
    loss = divergences([part.to(given[0].device) for part in wanted], given).mean()
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(
            "the divergence from the reference is NaN or Inf, because one of the models returns NaN or Inf."
        )
    return loss


def _held_out(model: nn.Module, reference: nn.Module, sequences: Samples) -> float:
    with torch.no_grad():
        found = batches(sequences, _batch_size(sequences))
        return sum(float(_loss(model, reference, batch)) * size_of(batch) for batch in found)


@contextmanager
def _learning(
    model: nn.Module, reference: nn.Module, factors: Sequence[GroupFactors]
) -> Iterator[dict[str, SharedCorrection]]:
    """Attach float32 copies of the factors, the only parameters that take gradients; yield group name -> container."""
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
                f"{name}: no gradient reaches its factors, because the base's kernels compute none. Correct this "
                "model without distillation."
            )


def _copied(entry: GroupFactors) -> GroupFactors:
    """Copy the factors to new float32 tensors, also rounded ones, so that training does not change the original."""
    lefts = {name: left.float().clone() for name, left in entry.lefts.items()}
    return replace(entry, right=entry.right.float().clone(), lefts=lefts, bits=None)


def _read(entry: GroupFactors, container: SharedCorrection) -> GroupFactors:
    def stored(factor: Any, like: Tensor) -> Tensor:
        return factor.factor.detach().to(like.device, like.dtype, copy=True)

    lefts = zip(entry.lefts.items(), container.lefts, strict=True)
    return replace(
        entry,
        right=stored(container.right, entry.right),
        lefts={member: stored(factor, left) for (member, left), factor in lefts},
    )


def _order(count: int, seed: int) -> Iterator[int]:
    """Yield the index of every sequence once in a random order, then again in another random order, without end."""
    draw = random.Random(seed)
    while True:
        yield from draw.sample(range(count), count)


def _batch_size(sequences: Samples) -> int:
    return max(1, _BATCH_TOKENS // sequences.shape[1])
