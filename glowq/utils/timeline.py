"""How long the stages of a command take: loading, gradients, blocks, measuring, evaluating and others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["stage", "timeline"]


class _Clock:
    """Seconds of every stage, without those of the stages inside of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inner = [0.0]  # seconds of the stages inside of each open stage


_clock: ContextVar[_Clock | None] = ContextVar("glowq_clock", default=None)


@contextmanager
def timeline() -> Iterator[dict[str, float]]:
    """Record the stages inside this context.

    Yields:
        Name of the stage -> seconds, in the order in which the stages ended first. A stage that ran several times has
        the sum. The time of a stage inside of another one counts for the inner one only.
    """
    clock = _Clock()
    token = _clock.set(clock)
    try:
        yield clock.seconds
    finally:
        _clock.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A stage, as a context or as a decorator; without `timeline`, it costs nothing."""
    clock = _clock.get()
    if clock is None:
        yield
        return
    start = time.perf_counter()
    clock.inner.append(0.0)
    try:
        yield
    finally:
        whole = time.perf_counter() - start
        own = whole - clock.inner.pop()
        clock.inner[-1] += whole
        clock.seconds[name] = clock.seconds.get(name, 0.0) + own
