"""Measure how the correction of one group alone changes the outputs of the quantized model.

The solver predicts gains by a second-order model of the loss, in which inputs and gradients are independent. A forward
with the correction of one group shows its real effect, and whether it helps at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..factors.factors import GroupFactors
from ..runtime.attach import applied
from .measured_changes import Change, Measured, measure_changes

__all__ = ["Measured", "calibrated", "measure_groups"]


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
        Group name -> measurement, see `measure_changes`.

    Raises:
        SensitivityError: the models return neither logits nor final states.
    """

    def change(entry: GroupFactors) -> Change:
        def attached(scale: float) -> AbstractContextManager[Any]:
            lefts = {member: left * scale for member, left in entry.lefts.items()}
            return applied(model, [entry if scale == 1 else replace(entry, lefts=lefts)])

        return Change(entry.group.name, entry.group.block, attached, float(entry.gains.sum()))

    return measure_changes(model, reference, [change(entry) for entry in factors], sequences)


def calibrated(factors: Sequence[GroupFactors], measured: Mapping[str, Measured]) -> list[GroupFactors]:
    """Return the factors with gains and totals scaled so that the gains of a group add up to its measured gain.

    A group whose gains or change are zero keeps its gains and total. One without a measured gain has gains of zero, and
    a total that is scaled to its change: its error is still there.
    """
    found = []
    for entry in factors:
        predicted, effect = float(entry.gains.sum()), measured[entry.group.name]
        if predicted > 0 and effect.change > 0:
            total = entry.total * (effect.gain or effect.change) / predicted
            entry = replace(entry, gains=entry.gains * (effect.gain / predicted), total=total)
        found.append(entry)
    return found
