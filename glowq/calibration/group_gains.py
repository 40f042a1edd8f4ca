"""Measure how the correction of one group alone changes the outputs of the quantized model.

The solver predicts gains by a second-order model of the loss, in which inputs and gradients are independent. A forward
with the correction of one group shows its real effect, and whether it helps at all. The blocks before the group return
their recorded outputs, so that only the layers from there on are run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..data.tokens import batches
from ..evaluation.divergence import answer, divergences
from ..evaluation.intervals import Interval, mean_interval, text_parts
from ..factors.factors import GroupFactors
from ..factors.units import GainUnit
from ..models.forward import evaluating, replaced_forward, to_model
from ..runtime.attach import attach, detach
from ..utils.logging import progress

__all__ = ["Measured", "calibrated", "measure_groups"]

_BATCH_TOKENS = 512
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
    unit = GainUnit.NATS
    size = max(1, _BATCH_TOKENS // sequences.shape[1])
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(evaluating(reference))
        steps = -(-len(sequences) // size) * len(factors)
        bar = stack.enter_context(progress(total=steps, desc="Measuring", unit="group"))
        for batch in batches(sequences, size):
            wanted = answer(reference(**to_model(batch, reference)))
            inputs = to_model(batch, model)
            prefix = _Prefix(model, [entry.group.block for entry in factors])
            plain = answer(prefix.record(inputs))
            unit = GainUnit.NATS if len(plain) == 1 else GainUnit.SQUARED_DISTANCE
            wanted = [part.to(plain[0].device) for part in wanted]
            before = divergences(wanted, plain)
            for entry in factors:
                _measure(prefix, inputs, entry, samples[entry.group.name], wanted, plain, before)
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


def _measure(
    prefix: _Prefix,
    inputs: Mapping[str, Any],
    entry: GroupFactors,
    samples: _Samples,
    wanted: list[Tensor],
    plain: list[Tensor],
    before: Tensor,
) -> None:
    given = prefix.answer(inputs, entry)
    changes = divergences(plain, given)
    change = float(changes.mean())
    samples.changes.append(change * changes.numel())
    benefit = (before - divergences(wanted, given)).cpu()
    samples.benefits.append(benefit.reshape(len(plain[0]), -1))
    if samples.amplified or (len(samples.changes) == 1 and change < _LEAST_CHANGE):
        power = (
            samples.amplified[0][1]
            if samples.amplified
            else min(_MAX_AMPLIFICATION**2, max(4.0, _LEAST_CHANGE / max(change, 1e-12)))
        )
        larger = {member: left * math.sqrt(power) for member, left in entry.lefts.items()}
        given = prefix.answer(inputs, replace(entry, lefts=larger))
        samples.amplified.append((float(divergences(plain, given).mean()) * changes.numel(), power))


class _Prefix:
    """Records the outputs of blocks in one forward; in later forwards, the blocks return them without being run."""

    def __init__(self, model: nn.Module, stops: Sequence[str]) -> None:
        self.model = model
        self.stops = list(dict.fromkeys(stops))
        self.outputs: dict[str, Any] = {}
        self.runs = dict.fromkeys(self.stops, 0)

    def record(self, inputs: Mapping[str, Any]) -> Any:
        """Run the model and return its output; record the output of every block in `stops`."""
        with ExitStack() as stack:
            for stop in self.stops:

                def keep(module: nn.Module, args: Any, output: Any, stop: str = stop) -> None:
                    self.outputs[stop] = output
                    self.runs[stop] += 1

                stack.callback(self.model.get_submodule(stop).register_forward_hook(keep).remove)
            return self.model(**inputs)

    def answer(self, inputs: Mapping[str, Any], entry: GroupFactors) -> list[Tensor]:
        """Return the model's answer with one group's correction; the blocks before the group's block are not run."""
        # A block that runs more than once (shared weights) returns something else each time.
        known = self.stops[: self.stops.index(entry.group.block)] if set(self.runs.values()) <= {0, 1} else []
        with self._replaying(known):
            attach(self.model, entry)
            try:
                return answer(self.model(**inputs))
            finally:
                detach(self.model)

    @contextmanager
    def _replaying(self, stops: Sequence[str]) -> Iterator[None]:
        with ExitStack() as stack:
            for stop in stops:
                if stop in self.outputs:
                    module = self.model.get_submodule(stop)
                    # A later layer may write into its input: every forward gets a copy.
                    given = partial(_again, self.outputs[stop])
                    stack.enter_context(replaced_forward(module, given))
            yield


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _again(output: Any, *args: Any, **kwargs: Any) -> Any:
    return tree_map(_copy, output)
