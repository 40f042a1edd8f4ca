"""The time line of a command: which stages it has, and that no time counts twice."""

from __future__ import annotations

import pytest

from glowq.utils import timeline as module
from glowq.utils.timeline import stage, timeline


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still; its only item is the time."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_the_time_of_a_stage_inside_counts_once(clock: list[float]) -> None:
    @stage("inner")
    def work(seconds: float) -> float:
        clock[0] += seconds
        return seconds

    @stage("failed")
    def fail() -> float:
        clock[0] += 16
        return 1 / 0

    with timeline() as stages:
        with stage("outer"):
            clock[0] += 1
            work(2)
            clock[0] += 4
        assert work(8) == 8
        with pytest.raises(ZeroDivisionError):
            fail()
    work(32)  # after the end
    assert stages == {"inner": 10.0, "outer": 5.0, "failed": 16.0}


def test_nothing_is_recorded_without_a_time_line(clock: list[float]) -> None:
    with stage("alone"):
        clock[0] += 1
    with timeline() as stages:
        pass
    assert stages == {}
