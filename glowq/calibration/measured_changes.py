"""Measure how a change inside of one block changes the outputs of the quantized model, and whether it helps.

Different changes can be compared: factors of a group, or other weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..data.inputs import Samples
from ..evaluation.divergence import divergences
from ..evaluation.intervals import Interval, mean_interval, text_parts
from ..factors.units import GainUnit
from ..utils.logging import progress
from ..utils.timeline import stage
from .block_replay import Replay, replaying, steps_of

__all__ = ["Change", "Measured", "measure_changes"]

_LEAST_CHANGE = 4e-3  # nats; a smaller change cannot be distinguished from the rounding of half precision
_TARGET_CHANGE = 2e-2  # nats; by how much an amplified change shall change the outputs
_MOST_CHANGE = 0.2  # nats; an amplified change that changes them by more is no longer a small one
_MOST_POWER = 32.0**2  # largest square of an amplification


@dataclass(frozen=True)
class Change:
    """A change of the model.

    Attributes:
        name: what the measurement is returned by.
        block: name of the block outside of which nothing is changed.
        applied: function that takes a factor, and returns a context inside of which the model has the change times
            this factor.
        predicted: divergence that the change is expected to cause, in any unit that is the same for all changes. It
            chooses the amplification that is tried first.
    """

    name: str
    block: str
    applied: Callable[[float], AbstractContextManager[Any]]
    predicted: float = _LEAST_CHANGE


@dataclass(frozen=True)
class Measured:
    """The effect of one change when it is the only one in the quantized model, such as the correction of one group.

    Attributes:
        change: mean divergence between the outputs with and without it: nats per token, or for an encoder the squared
            distance per sequence.
        benefit: decrease of the divergence from the reference, in the same unit, with its 95% interval over parts
            of 32 tokens (for an encoder: over sequences).
        before: mean divergence of the unchanged model from the reference, in the same unit.
        unit: NATS, or SQUARED_DISTANCE for an encoder.
    """

    change: float
    benefit: Interval
    before: float
    unit: GainUnit

    @property
    def gain(self) -> float:
        """What the change is worth beside others: the mean of its change and its benefit, at least 0.

        Alone, a change with the direction d gains d^T H e - d^T H d / 2, where e is the error of the whole model and H
        the curvature of the divergence: this is the benefit, and d^T H d / 2 is the change. If errors of other layers
        are removed as well, less or more is left to gain. The average over all orders in which the errors can be
        removed is d^T H e / 2, the mean of both (the Shapley value of a quadratic loss).
        """
        return max(0.0, (self.change + self.benefit.value) / 2)


@stage("measuring")
def measure_changes(
    model: nn.Module, reference: nn.Module, changes: Sequence[Change], sequences: Samples
) -> dict[str, Measured]:
    """Make one change at a time, and compare the outputs with those of `model` and of the reference.

    Args:
        model: quantized model without a correction, which is the same afterwards.
        reference: full-precision model.
        changes: changes in the order in which the forward calls their blocks.
        sequences: token ids that are not calibrated on, shape (n, length), int64.

    Returns:
        Name -> measurement. If the rounding of half precision could hide a change, it is measured with an
        amplification, and the result is scaled back, see `_Samples.add`.

    Raises:
        SensitivityError: the models return neither logits nor final states.
    """
    measurements = _Measurements(model)
    unit, blocks = GainUnit.NATS, [change.block for change in changes]
    before: list[Tensor] = []
    with (
        replaying(model, reference, blocks, sequences) as replays,
        progress(total=steps_of(sequences) * len(changes), desc="Measuring", unit="group") as bar,
    ):
        for replay in replays:
            unit = replay.unit
            before.append(replay.shaped(replay.before).double().flatten())
            for change in changes:
                measurements.add(replay, change)
                bar.update()
    mean = float(torch.cat(before).mean())
    return {name: found.summary(mean, unit) for name, found in measurements.samples.items()}


@dataclass
class _Samples:
    """The measurements of one change, one entry per batch.

    Attributes:
        power: square of the amplification t with which the change is measured, at least 1.
        changes: divergence that the amplified change causes, summed over tokens (for an encoder: over sequences).
        benefits: decrease of the divergence from the reference by the change itself, shape (batch, length), or
            (batch, 1) for an encoder.
    """

    power: float
    changes: list[float]
    benefits: list[Tensor]

    def add(self, changes: Tensor, benefits: Tensor) -> None:
        """Add the divergence and the benefit that the amplified change has in one batch, both of one shape.

        For a small change, the divergence grows with t^2, and the benefit is t L - t^2 C, where C is the divergence for
        t = 1. So one measurement determines L and C, and with them the benefit L - C of the change itself.
        """
        self.changes.append(float(changes.double().sum()))
        changes, t = changes.to(benefits), math.sqrt(self.power)
        self.benefits.append(benefits if t == 1 else (benefits + changes) / t - changes / self.power)

    def summary(self, before: float, unit: GainUnit) -> Measured:
        benefits = torch.cat(self.benefits)
        change = math.fsum(self.changes) / benefits.numel() / self.power
        return Measured(change, mean_interval(text_parts(benefits)), before, unit)


class _Measurements:
    """Measures changes one after the other, amplified where rounding to half precision could hide them."""

    def __init__(self, model: nn.Module) -> None:
        self.samples: dict[str, _Samples] = {}
        self._is_half = getattr(model, "dtype", torch.float32) in (torch.bfloat16, torch.float16)
        self._ratios: list[float] = []  # measured over predicted, of the changes so far

    def add(self, replay: Replay, change: Change) -> None:
        """Measure one change on one batch."""
        if change.name in self.samples:
            self.samples[change.name].add(*_run(replay, change, self.samples[change.name].power))
            return
        power = _power(change.predicted * (median(self._ratios) if self._ratios else 1.0)) if self._is_half else 1.0
        changes, benefits = _run(replay, change, power)
        found = float(changes.mean())
        is_off = (found < _LEAST_CHANGE and power < _MOST_POWER) or (found > _MOST_CHANGE and power > 1)
        if self._is_half and is_off:
            power = _power(found / power)
            changes, benefits = _run(replay, change, power)
            found = float(changes.mean())
        self.samples[change.name] = _Samples(power, [], [])
        self.samples[change.name].add(changes, benefits)
        if change.predicted > 0 and found > 0:
            self._ratios.append(found / power / change.predicted)


def _power(change: float) -> float:
    """The square of the amplification that brings a change to `_TARGET_CHANGE`; 1 if rounding cannot hide it."""
    return 1.0 if change >= _LEAST_CHANGE else min(_MOST_POWER, _TARGET_CHANGE / max(change, 1e-12))


def _run(replay: Replay, change: Change, power: float) -> tuple[Tensor, Tensor]:
    """The divergence from the unchanged model, and the benefit, of an amplified change in one batch."""
    given = replay.answer(change.block, change.applied(math.sqrt(power)))
    return replay.shaped(divergences(replay.plain, given)), replay.benefits(given)
