"""Calibration, block by block: every batch is one forward of the model, paused at each block.

The model's own forward routes masks, caches and position embeddings, so that any architecture can be walked without
knowing how it calls its blocks; only the activations between two blocks are held, never a whole model's statistics.
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
    """Pauses one forward per batch at each block's exit.

    Use as a context manager, and call `collect` for each block in the order in which the model calls them. When the
    walk moves on, each batch first repeats the block that it paused in, so that the next block reads what the block
    gives out with the correction that was attached meanwhile.

    Args:
        model: any model; left as it was found when the context ends.
        batches: keyword arguments of one forward each.
        stops: block names in the order of their calls; each is called once per forward. "" stands for the model.
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
                handles = _pause_at(self.model.get_submodule(stop), self._order[stop])
                for handle in handles:
                    self._exit.callback(handle.remove)
        self._forwards = [_PausedForward(self.model, batch) for batch in self.batches]
        self._exit.callback(self._abandon)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._exit.close()

    def collect(self, stop: str, collectors: Sequence[MomentCollector]) -> Iterator[int]:
        """Run every batch up to the exit of block `stop`, feeding the collectors; yields the number of batches done."""
        with collecting(self.model, collectors) as feed:
            for done, forward in enumerate(self._forwards, start=1):
                feed.mask = forward.mask
                forward.advance(self._order[stop])
                yield done

    def _abandon(self) -> None:
        for forward in self._forwards:
            forward.throw(GreenletExit)


class _PausedForward(greenlet):  # type: ignore[misc]
    """One batch's forward; `position` is the number of the block that it is paused in, -1 before the first."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__(self._forward)
        self.model = model
        self.batch = batch
        self.position = -1
        self.repeating = False
        self.versions: list[int] = []

    @property
    def mask(self) -> Tensor | None:
        mask = self.batch.get("attention_mask")
        return mask if isinstance(mask, Tensor) else None

    def _forward(self) -> None:
        self.model(**self.batch)

    def advance(self, position: int) -> None:
        """Run on to the exit of block number `position`, or to the end of the forward."""
        while self.position < position and not self.dead:
            with _own_autocast():
                self.switch()


def _pause_at(module: nn.Module, position: int) -> list[Any]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward = getcurrent()
        if isinstance(forward, _PausedForward) and not forward.repeating:
            forward.versions = _versions(args, kwargs)

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        forward = getcurrent()
        if not isinstance(forward, _PausedForward) or forward.repeating:
            return None
        # A block that writes into its own input cannot be repeated: its first output stands.
        repeatable = forward.versions == _versions(args, kwargs)
        forward.position = position
        with _own_autocast():
            forward.parent.switch()
        if not repeatable:
            return None
        forward.repeating = True
        try:
            return module(*args, **kwargs)
        finally:
            forward.repeating = False

    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, with_kwargs=True),
    ]


@contextmanager
def _own_autocast() -> Iterator[None]:
    """Autocast belongs to the thread, not to a greenlet: afterwards it is what it was, whoever ran in between."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    before = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    try:
        yield
    finally:
        for kind, enabled, dtype in before:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


def _versions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int]:
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    # A tensor made in inference mode counts no versions; outside of that mode PyTorch forbids writing into it.
    return [tensor._version for tensor in tensors if not tensor.is_inference()]
