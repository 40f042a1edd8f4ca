"""Measure how the correction of one group alone changes the outputs of the quantized model.

The solver predicts gains by a second-order model of the loss, in which inputs and gradients are independent. A forward
with the correction of one group shows its real effect, and whether it helps at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor, nn

from ..evaluation.divergence import divergences
from ..evaluation.intervals import Interval, mean_interval, text_parts
from ..factors.factors import GroupFactors
from ..factors.units import GainUnit
from ..runtime.attach import applied
from ..utils.logging import progress
from ..utils.timeline import stage
from .block_replay import Replay, replaying, steps_of

__all__ = ["Measured", "calibrated", "measure_groups"]

_LEAST_CHANGE = 4e-3  # nats; a smaller change cannot be distinguished from the rounding of half precision
_TARGET_CHANGE = 2e-2  # nats; by how much an amplified correction shall change the outputs
_MOST_CHANGE = 0.2  # nats; an amplified correction that changes them by more is no longer a small one
_MOST_POWER = 32.0**2  # largest square of an amplification


@dataclass(frozen=True)
class Measured:
    """The effect of one group's correction when it is the only one in the quantized model.

    Attributes:
        change: mean divergence between the outputs with and without the correction: nats per token, or for an encoder
            the squared distance per sequence.
        benefit: decrease of the divergence from the reference, in the same unit, with its 95% interval over parts
            of 32 tokens (for an encoder: over sequences).
        unit: NATS, or SQUARED_DISTANCE for an encoder.
    """

    change: float
    benefit: Interval
    unit: GainUnit

    @property
    def harms(self) -> bool:
        """Whether the correction makes the outputs worse: the whole interval of its benefit is below zero."""
        return self.benefit.high < 0


@stage("measuring")
def measure_groups(
    model: nn.Module, reference: nn.Module, factors: Sequence[GroupFactors], sequences: Tensor
) -> dict[str, Measured]:
    """Attach the factors of one group at a time, and compare the outputs with those of `model` and of the reference.

    Args:
        model: quantized model without a correction. It has no correction afterwards.
        reference: full-precision model.
        factors: factors in the order in which the forward calls their groups.
        sequences: token ids that the factors were not calibrated on, shape (n, length), int64.

    Returns:
        Group name -> measurement. If the rounding of half precision could hide the change, an amplified correction is
        measured, and its change and benefit are scaled back, see `_Samples.add`.

    Raises:
        SensitivityError: the models return neither logits nor final states.
    """
    measurements = _Measurements(model)
    unit, blocks = GainUnit.NATS, [entry.group.block for entry in factors]
    with (
        replaying(model, reference, blocks, sequences) as replays,
        progress(total=steps_of(sequences) * len(factors), desc="Measuring", unit="group") as bar,
    ):
        for replay in replays:
            unit = replay.unit
            for entry in factors:
                measurements.add(replay, entry)
                bar.update()
    return {name: found.summary(unit) for name, found in measurements.samples.items()}


def calibrated(factors: Sequence[GroupFactors], measured: Mapping[str, Measured]) -> list[GroupFactors]:
    """Return the factors with gains and totals scaled so that the gains of a group add up to its measured change.

    A group keeps its gains and total if its gains or its change are zero.
    """
    found = []
    for entry in factors:
        predicted, change = float(entry.gains.sum()), measured[entry.group.name].change
        scale = change / predicted if predicted > 0 and change > 0 else 1.0
        found.append(replace(entry, gains=entry.gains * scale, total=entry.total * scale))
    return found


@dataclass
class _Samples:
    """The measurements of one group, one entry per batch.

    Attributes:
        power: square of the amplification t with which the correction is measured, at least 1.
        changes: divergence that the amplified correction causes, summed over tokens (for an encoder: over sequences).
        benefits: decrease of the divergence from the reference by the correction itself, shape (batch, length), or
            (batch, 1) for an encoder.
    """

    power: float
    changes: list[float]
    benefits: list[Tensor]

    def add(self, changes: Tensor, benefits: Tensor) -> None:
        """Add the change and the benefit that the amplified correction has in one batch, of any equal number of values.

        For a small correction, the change grows with t^2, and the benefit with t L - t^2 C, where C is the change of
        the correction itself. So one measurement determines L and C, and with them the benefit L - C.
        """
        self.changes.append(float(changes.double().sum()))
        changes, t = changes.reshape(benefits.shape).to(benefits), math.sqrt(self.power)
        self.benefits.append(benefits if t == 1 else (benefits + changes) / t - changes / self.power)

    def summary(self, unit: GainUnit) -> Measured:
        benefits = torch.cat(self.benefits)
        change = math.fsum(self.changes) / benefits.numel() / self.power
        return Measured(change, mean_interval(text_parts(benefits)), unit)


class _Measurements:
    """Measures groups one after the other, with an amplification that rounding to half precision calls for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.samples: dict[str, _Samples] = {}
        self._is_half = getattr(model, "dtype", torch.float32) in (torch.bfloat16, torch.float16)
        self._ratios: list[float] = []  # measured over predicted change, of the groups so far

    def add(self, replay: Replay, entry: GroupFactors) -> None:
        """Measure one group on one batch."""
        name = entry.group.name
        if name in self.samples:
            self.samples[name].add(*self._run(replay, entry, self.samples[name].power))
            return
        power = self._first_power(entry)
        changes, benefits = self._run(replay, entry, power)
        found = float(changes.mean())
        is_off = (found < _LEAST_CHANGE and power < _MOST_POWER) or (found > _MOST_CHANGE and power > 1)
        if self._is_half and is_off:
            power = _power(found / power)
            changes, benefits = self._run(replay, entry, power)
            found = float(changes.mean())
        self.samples[name] = _Samples(power, [], [])
        self.samples[name].add(changes, benefits)
        predicted = float(entry.gains.sum())
        if predicted > 0 and found > 0:
            self._ratios.append(found / power / predicted)

    def _first_power(self, entry: GroupFactors) -> float:
        """The amplification for the change that the solver predicts, as far as its earlier predictions were right."""
        ratio = median(self._ratios) if self._ratios else 1.0
        return _power(float(entry.gains.sum()) * ratio) if self._is_half else 1.0

    def _run(self, replay: Replay, entry: GroupFactors, power: float) -> tuple[Tensor, Tensor]:
        if power != 1:
            factor = math.sqrt(power)
            entry = replace(entry, lefts={member: left * factor for member, left in entry.lefts.items()})
        given = replay.answer(entry.group.block, applied(self.model, [entry]))
        return divergences(replay.plain, given), replay.benefits(given)


def _power(change: float) -> float:
    """The square of the amplification that brings a change to `_TARGET_CHANGE`; 1 if rounding cannot hide it."""
    return 1.0 if change >= _LEAST_CHANGE else min(_MOST_POWER, _TARGET_CHANGE / max(change, 1e-12))
