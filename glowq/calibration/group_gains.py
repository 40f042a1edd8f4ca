"""Measure what the correction of every group gains, and scale the gains of its ranks to it.

The solver predicts gains by a second-order model of the loss, in which inputs and gradients are independent. They order
the ranks of one group; how much the group is worth beside others is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from torch import Tensor, nn

from ..data.inputs import Samples
from ..errors import SensitivityError
from ..evaluation.intervals import Interval, mean_interval, text_parts
from ..factors.factors import GroupFactors
from ..factors.group import Group
from ..factors.units import GainUnit
from ..runtime.attach import applied
from ..utils.timeline import stage
from .measured_changes import Change, measure_changes
from .path_gains import gains_along_path

__all__ = ["GroupGain", "calibrated", "measure_groups"]


@dataclass(frozen=True)
class GroupGain:
    """What the correction of one group is worth beside the others.

    Attributes:
        interval: the gain with its 95% interval over parts of 32 tokens (for an encoder: over sequences), in nats per
            token, or for an encoder in squared distance per sequence.
        before: divergence of the model without any correction from the reference on the same text, in the same unit.
        unit: NATS, or SQUARED_DISTANCE for an encoder.
    """

    interval: Interval
    before: float
    unit: GainUnit

    @property
    def gain(self) -> float:
        """The gain, at least 0."""
        return max(0.0, self.interval.value)

    @property
    def harms(self) -> bool:
        """Whether it makes the outputs worse: the whole interval is below zero."""
        return self.interval.high < 0


@stage("measuring")
def measure_groups(
    model: nn.Module, reference: nn.Module, factors: Sequence[GroupFactors], sequences: Samples
) -> dict[str, GroupGain]:
    """Measure all groups together, see `gains_along_path`; or if the model has no gradient, one after the other.

    Args:
        model: quantized model without a correction. It has no correction afterwards.
        reference: full-precision model.
        factors: factors in the order in which the forward calls their groups.
        sequences: token ids that the factors were not calibrated on, shape (n, length), int64.

    Returns:
        Group name -> gain.

    Raises:
        SensitivityError: the models return neither logits nor final states.
    """
    try:
        found = gains_along_path(model, reference, [_Correction(model, entry) for entry in factors], sequences)
    except SensitivityError:
        return _one_by_one(model, reference, factors, sequences)
    return {
        name: GroupGain(mean_interval(text_parts(values)), found.before, found.unit)
        for name, values in found.parts.items()
    }


@dataclass(frozen=True)
class _Correction:
    """The correction of one group, see `PathChange`."""

    model: nn.Module
    factors: GroupFactors

    @property
    def group(self) -> Group:
        return self.factors.group

    def applied(self, strength: float) -> AbstractContextManager[Any]:
        return applied(self.model, [_scaled(self.factors, strength)])

    def added(self, member: str, x: Tensor) -> Tensor:
        right, left = (part.to(x) for part in (self.factors.right, self.factors.lefts[member]))
        return x @ right.T @ left.T


def _scaled(entry: GroupFactors, strength: float) -> GroupFactors:
    if strength == 1:
        return entry
    return replace(entry, lefts={member: left * strength for member, left in entry.lefts.items()})


def _one_by_one(
    model: nn.Module, reference: nn.Module, factors: Sequence[GroupFactors], sequences: Samples
) -> dict[str, GroupGain]:
    """Attach the factors of one group at a time, and compare the outputs with those of `model` and of the reference."""

    def change(entry: GroupFactors) -> Change:
        def attached(scale: float) -> AbstractContextManager[Any]:
            return applied(model, [_scaled(entry, scale)])

        return Change(entry.group.name, entry.group.block, attached, float(entry.gains.sum()))

    gains = {}
    for name, found in measure_changes(model, reference, [change(entry) for entry in factors], sequences).items():
        ends = (found.benefit.value, found.benefit.low, found.benefit.high)
        gains[name] = GroupGain(Interval(*((found.change + end) / 2 for end in ends)), found.before, found.unit)
    return gains


def calibrated(factors: Sequence[GroupFactors], measured: Mapping[str, GroupGain]) -> list[GroupFactors]:
    """Return the factors with gains and totals scaled so that the gains of a group add up to its measured gain.

    Few tokens measure a gain with much noise. So it is shrunk towards the solver's prediction, see `_shrunk`. A group
    without a gain has gains of zero, and a total that is scaled as those of the others are: its error is still there.
    """
    predicted = {entry.group.name: max(0.0, float(entry.gains.sum())) for entry in factors}
    gains = _shrunk(predicted, measured)
    scales = {name: gains[name] / found for name, found in predicted.items() if found > 0 and gains[name] > 0}
    usual = median(scales.values()) if scales else 1.0
    return [
        replace(
            entry,
            gains=entry.gains * scales.get(entry.group.name, 0.0),
            total=entry.total * scales.get(entry.group.name, usual),
        )
        for entry in factors
    ]


def _shrunk(predicted: Mapping[str, float], measured: Mapping[str, GroupGain]) -> dict[str, float]:
    """The best estimates of all gains from noisy measurements and from predictions in another unit.

    The predictions are scaled to the sum of the measured gains. How far the gains themselves, without noise, lie from
    them is estimated as a share t of each prediction. A measurement of variance v then counts with the weight
    t^2 / (t^2 + v / prediction^2), and the prediction with the rest.

    Source: DerSimonian and Laird, Meta-analysis in Clinical Trials (1986), for t by the method of moments.
    """
    values = {name: found.interval.value for name, found in measured.items()}
    whole = math.fsum(predicted.values())
    scale = math.fsum(values.values()) / whole if whole > 0 else 0.0
    if scale <= 0:
        return {name: found.gain for name, found in measured.items()}
    variances = {name: ((found.interval.high - found.interval.low) / 4) ** 2 for name, found in measured.items()}
    expected = {name: scale * found for name, found in predicted.items()}
    known = [name for name, variance in variances.items() if math.isfinite(variance)]
    apart = math.fsum((values[name] - expected[name]) ** 2 - variances[name] for name in known)
    power = math.fsum(expected[name] ** 2 for name in known)
    spread = max(0.0, apart) / power if power > 0 else 0.0
    gains = {}
    for name, prior in expected.items():
        trusted = spread * prior**2
        weight = trusted / (trusted + variances[name]) if trusted > 0 and math.isfinite(variances[name]) else 0.0
        gains[name] = max(0.0, prior + weight * (values[name] - prior))
    return gains
