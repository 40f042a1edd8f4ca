"""Run many drawn cases of one test, each within bounds of time and memory: a few in `make test`, all in `make fuzz`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from glowq.errors import GlowQError

SECONDS = 5.0  # of computing that one case may take; most take some milliseconds
WAITING = 60.0  # seconds that it may take in all: other programs may use the processor, too
MEMORY = 256 * 2**20  # bytes that one case may take
PART = 2000  # cases of one test of `make fuzz`

_LONGEST_MESSAGE = 1500  # letters


class TooLongError(BaseException):
    """A case takes too long. Not an Exception, so that code which handles every Exception does not handle it."""


@dataclass(frozen=True)
class Part:
    """Some of the cases of a test.

    Attributes:
        seed: seed of the draw: the same cases are drawn in every run.
        cases: number of cases.
    """

    seed: int
    cases: int

    def run(self, strategy: SearchStrategy[Any], check: Callable[[Any], Any]) -> None:
        """Draw the cases and check each. A case that fails is made smaller, and then shown."""
        done = 0

        @seed(self.seed)
        @settings(
            max_examples=self.cases,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def case(drawn: Any) -> None:
            nonlocal done
            done += 1
            with bounded():
                check(drawn)

        case()
        assert done >= self.cases, f"only {done} cases were drawn"


def parts(cases: int, few: int = 10) -> pytest.MarkDecorator:
    """Run a test, which takes `part`, with `few` cases in `make test`, and with `cases` in `make fuzz`."""
    whole = [Part(number, PART) for number in range(1, cases // PART + 1)]
    if cases % PART:
        whole.append(Part(len(whole) + 1, cases % PART))
    every = [pytest.param(part, id=f"{part.seed}-of-{len(whole)}", marks=pytest.mark.fuzz) for part in whole]
    return pytest.mark.parametrize("part", [pytest.param(Part(0, few), id=f"{few}-cases"), *every])


@contextmanager
def bounded(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Fail if what runs inside takes too long or, on Linux, too much memory. Windows has no such bounds.

    Args:
        seconds: how long it may compute.
        memory: bytes that it may take.

    Raises:
        AssertionError: it computed longer, or took longer than `WAITING`.
        MemoryError: it took more.
    """
    if sys.platform == "win32":
        yield
        return
    import resource

    clocks = {signal.ITIMER_PROF: signal.SIGPROF, signal.ITIMER_REAL: signal.SIGALRM}
    before = {number: signal.signal(number, _ring) for number in clocks.values()}
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        data = int(statistics.read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (data + memory, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    try:
        yield
    except TooLongError:
        raise AssertionError(f"this took more than {seconds} seconds of computing, or {WAITING} in all") from None
    finally:
        for clock, number in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(number, before[number])
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def _ring(*_: Any) -> None:
    raise TooLongError


def refusal(call: Callable[[], Any], *also: type[Exception]) -> Exception | None:
    """The error with which `call` refuses, one of glowq or of `also`; None if it does not refuse.

    Any other error passes, and fails the test. An error of glowq must have a message that can be printed.
    """
    found: Exception | None = None
    try:
        call()
    except (GlowQError, *also) as error:
        found = error
    if isinstance(found, GlowQError):
        message = str(found)
        assert 0 < len(message) < _LONGEST_MESSAGE
        message.encode()
    return found
