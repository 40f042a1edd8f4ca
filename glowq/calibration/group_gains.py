"""What restoring one group alone really does to the quantized model's answers, beside what its gains predict.

Gains come from a second-order model of the loss in which inputs and gradients are independent. A forward with the
group's correction alone shows what they are worth, and whether they help at all. The blocks before the group give out
what they gave out before, so that only the layers after it are run.
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
from ..evaluation.intervals import Interval, mean_interval
from ..factors.factors import GroupFactors
from ..factors.units import GainUnit
from ..models.forward import evaluating, replaced_forward, to_model
from ..runtime.attach import attach, detach
from ..utils.logging import progress

__all__ = ["Measured", "calibrated", "measure_groups"]

_BATCH_TOKENS = 512
_PART = 32  # consecutive tokens whose benefits are one value of an interval: those of neighbours depend on each other
_AUDIBLE = 4e-3  # nats; half precision rounds anew after every change, however small
_LOUDEST = 32.0  # most that a correction is amplified


@dataclass(frozen=True)
class Measured:
    """One group's correction, alone in the quantized model.

    Attributes:
        change: divergence of the answers from those without it, per token, in nats or squared distance.
        benefit: how much nearer they come to the reference's, in the same unit, with its 95% interval over parts of
            32 tokens (of an encoder: over sequences).
        unit: NATS, or SQUARED_DISTANCE of an encoder's states.
    """

    change: float
    benefit: Interval
    unit: GainUnit

    @property
    def harms(self) -> bool:
        """Whether the group makes answers worse, beyond chance."""
        return self.benefit.high < 0


def measure_groups(
    model: nn.Module, reference: nn.Module, factors: Sequence[GroupFactors], sequences: Tensor
) -> dict[str, Measured]:
    """Attach each group's factors alone; compare the answers with those of the plain model and of the reference.

    Args:
        model: quantized, without a correction; left so.
        reference: the full-precision model.
        factors: in the order in which the forward calls their groups.
        sequences: token ids that the factors were not calibrated on, shape (n, length), int64.

    Returns:
        Group name -> what was measured. Changes are those of a small step: a correction whose effect drowns in half
        precision's rounding is amplified, and the rounding's share subtracted.

    Raises:
        SensitivityError: the models give out neither logits nor final states.
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
    """The same factors, with gains and totals in the unit of what was measured.

    A group whose gains or whose change is zero keeps what it has.
    """
    found = []
    for entry in factors:
        predicted, change = float(entry.gains.sum()), measured[entry.group.name].change
        scale = change / predicted if predicted > 0 and change > 0 else 1.0
        found.append(replace(entry, gains=entry.gains * scale, total=entry.total * scale))
    return found


@dataclass(frozen=True)
class _Samples:
    """Per batch: change with the correction as it is and amplified (with the square of how much), and the benefit.

    A batch's benefits have shape (batch, length), of an encoder (batch, 1).
    """

    changes: list[float]
    loud: list[tuple[float, float]]
    benefits: list[Tensor]

    def summary(self, unit: GainUnit) -> Measured:
        change = math.fsum(self.changes)
        if self.loud:
            louder = math.fsum(found for found, _ in self.loud) - change
            change = max(0.0, louder / math.fsum(power - 1 for _, power in self.loud)) * len(self.loud)
        parts = max(1, self.benefits[0].shape[1] // _PART)
        benefits = torch.cat([part.mean(1) for part in torch.cat(self.benefits).double().tensor_split(parts, dim=1)])
        return Measured(change / len(self.changes), mean_interval(benefits), unit)


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
    change = float(divergences(plain, given).mean())
    samples.changes.append(change)
    benefit = (before - divergences(wanted, given)).cpu()
    samples.benefits.append(benefit.reshape(len(plain[0]), -1))
    if samples.loud or (len(samples.changes) == 1 and change < _AUDIBLE):
        power = samples.loud[0][1] if samples.loud else min(_LOUDEST**2, max(4.0, _AUDIBLE / max(change, 1e-12)))
        louder = {member: left * math.sqrt(power) for member, left in entry.lefts.items()}
        given = prefix.answer(inputs, replace(entry, lefts=louder))
        samples.loud.append((float(divergences(plain, given).mean()), power))


class _Prefix:
    """Lets blocks give out again what they gave out in a recorded forward."""

    def __init__(self, model: nn.Module, stops: Sequence[str]) -> None:
        self.model = model
        self.stops = list(dict.fromkeys(stops))
        self.outputs: dict[str, Any] = {}
        self.runs = dict.fromkeys(self.stops, 0)

    def record(self, inputs: Mapping[str, Any]) -> Any:
        """The model's output, remembering that of every stop."""
        with ExitStack() as stack:
            for stop in self.stops:

                def keep(module: nn.Module, args: Any, output: Any, stop: str = stop) -> None:
                    self.outputs[stop] = output
                    self.runs[stop] += 1

                stack.callback(self.model.get_submodule(stop).register_forward_hook(keep).remove)
            return self.model(**inputs)

    def answer(self, inputs: Mapping[str, Any], entry: GroupFactors) -> list[Tensor]:
        """The model's answer with one group's correction; only what comes after the group is run."""
        # A block that runs again (shared weights) gives out something else each time.
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
                    # A later layer may write into what it is given: every forward gets a copy.
                    given = partial(_again, self.outputs[stop])
                    stack.enter_context(replaced_forward(module, given))
            yield


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _again(output: Any, *args: Any, **kwargs: Any) -> Any:
    return tree_map(_copy, output)
