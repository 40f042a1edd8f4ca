"""Measure how the correction of one group alone changes the outputs of the quantized model.

The solver predicts gains by a second-order model of the loss, in which inputs and gradients are independent. A forward
with the correction of one group shows its real effect, and whether it helps at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..evaluation.divergence import divergences
from ..evaluation.intervals import Interval, mean_interval, text_parts
from ..factors.factors import GroupFactors
from ..factors.units import GainUnit
from ..runtime.attach import applied
from ..utils.logging import progress
from .block_replay import Replay, replaying, steps_of

__all__ = ["Measured", "calibrated", "measure_groups"]

_LEAST_CHANGE = 4e-3  # nats; a smaller change cannot be distinguished from the rounding of half precision
_MAX_AMPLIFICATION = 32.0  # largest factor by which a correction is amplified


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
        Group name -> measurement. If the rounding of half precision could hide the change, the correction is measured
        again with an amplification. The change is then computed from the difference of both measurements, in which the
        rounding error cancels.

    Raises:
        SensitivityError: the models return neither logits nor final states.
    """
    samples: dict[str, _Samples] = {entry.group.name: _Samples([], [], []) for entry in factors}
    unit, blocks = GainUnit.NATS, [entry.group.block for entry in factors]
    with (
        replaying(model, reference, blocks, sequences) as replays,
        progress(total=steps_of(sequences) * len(factors), desc="Measuring", unit="group") as bar,
    ):
        for replay in replays:
            unit = replay.unit
            for entry in factors:
                _measure(model, replay, entry, samples[entry.group.name])
                bar.update()
    return {name: found.summary(unit) for name, found in samples.items()}


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


@dataclass(frozen=True)
class _Samples:
    """The measurements of one group, one entry per batch.

    Attributes:
        changes: divergence that the correction causes, summed over tokens (for an encoder: over sequences).
        amplified: the same sum for the amplified correction, and the square of the amplification; empty if no
            amplification is needed.
        benefits: decrease of the divergence from the reference, shape (batch, length), or (batch, 1) for an encoder.
    """

    changes: list[float]
    amplified: list[tuple[float, float]]
    benefits: list[Tensor]

    def summary(self, unit: GainUnit) -> Measured:
        benefits = torch.cat(self.benefits)
        change = math.fsum(self.changes) / benefits.numel()
        if self.amplified:
            larger = math.fsum(found for found, _ in self.amplified) / benefits.numel()
            change = max(0.0, (larger - change) / (self.amplified[0][1] - 1))
        return Measured(change, mean_interval(text_parts(benefits)), unit)


def _measure(model: nn.Module, replay: Replay, entry: GroupFactors, samples: _Samples) -> None:
    given = replay.answer(entry.group.block, applied(model, [entry]))
    changes = divergences(replay.plain, given)
    change = float(changes.mean())
    samples.changes.append(change * changes.numel())
    samples.benefits.append(replay.benefits(given))
    if samples.amplified or (len(samples.changes) == 1 and change < _LEAST_CHANGE):
        power = (
            samples.amplified[0][1]
            if samples.amplified
            else min(_MAX_AMPLIFICATION**2, max(4.0, _LEAST_CHANGE / max(change, 1e-12)))
        )
        larger = replace(entry, lefts={member: left * math.sqrt(power) for member, left in entry.lefts.items()})
        given = replay.answer(entry.group.block, applied(model, [larger]))
        samples.amplified.append((float(divergences(replay.plain, given).mean()) * changes.numel(), power))
