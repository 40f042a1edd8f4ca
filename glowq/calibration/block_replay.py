"""Compare a changed model with its reference, where the blocks before the change are not run again.

One forward of the unchanged model records the output of every block. In a forward with a change inside of one block,
the blocks before it return what they returned then, so that only the layers from there on are run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..data.inputs import Samples, batches, rows_of_samples
from ..evaluation.divergence import answer, divergences
from ..factors.units import GainUnit
from ..models.forward import evaluating, replaced_forward, to_model

__all__ = ["Replay", "replaying", "steps_of"]

_BATCH_TOKENS = 512


class Replay:
    """One batch of held-out tokens: the answers of the reference and of the model, and those of the changed model.

    Attributes:
        wanted: `answer` of the reference, on the device of `plain`.
        plain: `answer` of the unchanged model.
        before: divergence of `plain` from `wanted`, shape (tokens,), or (batch,) for an encoder.
        unit: NATS, or SQUARED_DISTANCE for an encoder.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        blocks: Sequence[str],
        batch: Mapping[str, Any],
        sequences: Samples,
    ) -> None:
        self._batch, self._sequences = batch, sequences
        self._prefix = _Prefix(model, blocks)
        wanted = answer(reference(**to_model(batch, reference)))
        self._inputs = to_model(batch, model)
        self.plain = answer(self._prefix.record(self._inputs))
        self.unit = GainUnit.NATS if len(self.plain) == 1 else GainUnit.SQUARED_DISTANCE
        self.wanted = [part.to(self.plain[0].device) for part in wanted]
        self.before = divergences(self.wanted, self.plain)

    def answer(self, block: str, change: AbstractContextManager[Any]) -> list[Tensor]:
        """Return the model's answer inside of `change`, which changes nothing outside of `block`."""
        return self._prefix.answer(self._inputs, block, change)

    def benefits(self, given: list[Tensor]) -> Tensor:
        """Return how much nearer to the reference `given` is than `plain`, on the CPU.

        The shape is (batch, length), or (batch, 1) for an encoder or for samples of no common length.
        """
        return self.shaped(self.before - divergences(self.wanted, given))

    def shaped(self, values: Tensor) -> Tensor:
        """Divergences of this batch in the shape of `benefits`."""
        return rows_of_samples(values.cpu(), self._batch, self._sequences)


def steps_of(sequences: Samples) -> int:
    """The number of batches that `replaying` makes of these sequences."""
    return sum(1 for _ in batches(sequences, _batch_size(sequences)))


@contextmanager
def replaying(
    model: nn.Module, reference: nn.Module, blocks: Sequence[str], sequences: Samples
) -> Iterator[Iterator[Replay]]:
    """Inside this context, both models are in evaluation mode and compute no gradients.

    Args:
        model: the model that will be changed.
        reference: full-precision model.
        blocks: names of the blocks that will be changed, in the order in which the forward calls them; a name may be
            repeated.
        sequences: token ids, shape (n, length), int64.

    Yields:
        An iterator over the batches.

    Raises:
        SensitivityError: the models return neither logits nor final states.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(evaluating(reference))
        several = batches(sequences, _batch_size(sequences))
        yield (Replay(model, reference, blocks, batch, sequences) for batch in several)


def _batch_size(sequences: Samples) -> int:
    return max(1, _BATCH_TOKENS // sequences.shape[1])


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

    def answer(self, inputs: Mapping[str, Any], block: str, change: AbstractContextManager[Any]) -> list[Tensor]:
        """Return the model's answer inside of `change`; the blocks before `block` are not run."""
        # A block that runs more than once (shared weights) returns something else each time.
        known = self.stops[: self.stops.index(block)] if set(self.runs.values()) <= {0, 1} else []
        with self._replaying(known), change:
            return answer(self.model(**inputs))

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
