"""Calibration, block by block: every batch is one forward of the model, which pauses at the end of each block.

The model's own forward passes masks, caches and position embeddings to the blocks, so that any architecture works
without code that is specific to it. Only the activations between two blocks are held in memory, never the statistics of
the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from ..models.forward import evaluating
from .input_moments import MomentCollector, collecting

__all__ = ["BlockWalk"]

Batch = Mapping[str, Any]


class BlockWalk:
    """Runs one forward per batch, and pauses it at the end of each block.

    Use it as a context manager, and call `collect` for each block in the order in which the model calls the blocks.

    Args:
        model: any model. It is restored to its earlier state when the context ends.
        batches: keyword arguments of one forward each.
        stops: block names in the order of their calls; each block is called once per forward. "" is the whole model.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], stops: Sequence[str]) -> None:
        self.model = model
        self.batches = batches
        self.stops = list(stops)
        self._order = {stop: index for index, stop in enumerate(self.stops)}
        self._forwards: list[_PausedForward] = []
        self._exit = ExitStack()

    def __enter__(self) -> BlockWalk:
        self._exit.enter_context(torch.inference_mode(False))
        self._exit.enter_context(torch.no_grad())
        self._exit.enter_context(evaluating(self.model))
        for stop in self.stops:
            if stop:
                handle = _pause_at(self.model.get_submodule(stop), self._order[stop])
                self._exit.callback(handle.remove)
        self._forwards = [_PausedForward(self.model, batch) for batch in self.batches]
        self._exit.callback(self._abandon)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._exit.close()

    def collect(self, stop: str, collectors: Sequence[MomentCollector]) -> Iterator[int]:
        """Run every batch to the end of block `stop`, update the collectors, and yield the number of batches done."""
        with collecting(self.model, collectors) as feed:
            for done, forward in enumerate(self._forwards, start=1):
                feed.mask = forward.mask
                forward.advance(self._order[stop])
                yield done

    def _abandon(self) -> None:
        for forward in self._forwards:
            forward.throw(GreenletExit)


class _PausedForward(greenlet):  # type: ignore[misc]
    """The forward of one batch; `position` is the number of the block where it is paused, -1 before the first block."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__(self._forward)
        self.model = model
        self.batch = batch
        self.position = -1

    @property
    def mask(self) -> Tensor | None:
        mask = self.batch.get("attention_mask")
        return mask if isinstance(mask, Tensor) else None

    def _forward(self) -> None:
        self.model(**self.batch)

    def advance(self, position: int) -> None:
        """Continue to the end of block number `position`, or to the end of the forward."""
        while self.position < position and not self.dead:
            with _own_autocast():
                self.switch()


def _pause_at(module: nn.Module, position: int) -> Any:
    """Pause the running forward whenever `module` has returned; returns the handle of the hook."""

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        forward = getcurrent()
        if isinstance(forward, _PausedForward):
            forward.position = position
            with _own_autocast():
                forward.parent.switch()

    return module.register_forward_hook(leave)


@contextmanager
def _own_autocast() -> Iterator[None]:
    """Restore the autocast state at the end: it belongs to the thread, so that another greenlet may change it."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    before = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    try:
        yield
    finally:
        for kind, enabled, dtype in before:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
