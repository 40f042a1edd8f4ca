"""Commands that are killed or interrupted at any moment: nothing is half-written, and the next run is as the first."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from glowq.utils.manifest import MANIFEST, contents_of
from support.disturbed import Ended, Server, digests
from support.writing import sources, words

# Command -> numbers of kills and of interrupts in the long run.
COMMANDS = {
    "correct": (36, 10),
    "correct --resume": (40, 10),
    "correct --format full": (34, 10),
    "select": (30, 5),
    "export peft": (20, 5),
    "export merged": (20, 5),
    "import": (20, 5),
}
SHORT = ("correct --resume", "select")  # these have one of each in the short run, too
MOMENTS = 1000  # a moment is a share of the command's file operations, or of its time, in thousandths


class Moment(NamedTuple):
    """When a command is disturbed."""

    name: str
    moment: int
    timed: bool  # whether the moment is one of time, not of file operations
    earlier: bool  # whether the output folder holds an earlier result


class Place(NamedTuple):
    """The commands' input, a server that runs them, and what they write when nothing disturbs them."""

    folder: Path
    server: Server
    made: dict[str, tuple[dict[str, str], Ended]]

    def whole(self, name: str) -> tuple[dict[str, str], Ended]:
        """Digests of the files that a command writes, and how it ended."""
        if name not in self.made:
            out = self.stored(name)
            out.parent.mkdir(parents=True)
            ended = self.server.run(words(name, self.folder, out), out.parent)
            assert ended.status == 0, ended.stderr
            self.made[name] = (digests(out), ended)
        return self.made[name]

    def stored(self, name: str) -> Path:
        return self.folder / "whole" / name.replace(" ", "") / "out"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = sources(tmp_path_factory.mktemp("kills"))
    with Server(tmp_path_factory.mktemp("logs")) as server:
        yield Place(folder, server, {})


def cases(which: int) -> Iterator[Any]:
    for name, numbers in COMMANDS.items():
        draw = random.Random(f"{name} {which}")
        for number in range(numbers[which]):
            marks = [] if number == 0 and name in SHORT else [pytest.mark.long]
            found = Moment(name, draw.randrange(1, MOMENTS), draw.random() < 0.3, draw.random() < 0.5)
            yield pytest.param(found, marks=marks, id=f"{name}-{number}")


def disturbed(place: Place, moment: Moment, sent: int, out: Path) -> Ended:
    """Disturb a command, and check that its output folder is as before or complete."""
    expected, undisturbed = place.whole(moment.name)
    out.parent.mkdir()
    if moment.earlier:
        shutil.copytree(place.stored(moment.name), out)
    share = moment.moment / MOMENTS
    when: dict[str, Any] = {"operation": max(1, int(undisturbed.operations * share))}
    if moment.timed:
        when = {"seconds": max(1e-3, undisturbed.seconds * share)}
    ended = place.server.run(words(moment.name, place.folder, out), out.parent, sent, **when)
    if out.exists() or moment.earlier:
        assert digests(out) == expected
        assert not contents_of(out).foreign
        assert (out / MANIFEST).is_file()
    return ended


def again(place: Place, moment: Moment, out: Path) -> None:
    """Check that the same command writes what it always writes, and leaves nothing else."""
    done = place.server.run(words(moment.name, place.folder, out), out.parent)
    assert done.status == 0, done.stderr
    assert digests(out) == place.whole(moment.name)[0]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("moment", cases(0))
def test_a_killed_command(moment: Moment, place: Place, tmp_path: Path) -> None:
    out = tmp_path / "place" / "out"
    ended = disturbed(place, moment, signal.SIGKILL, out)
    assert ended.status in (-signal.SIGKILL, -signal.SIGALRM, 0)  # 0: it was faster than the clock
    again(place, moment, out)


@pytest.mark.parametrize("moment", cases(1))
def test_an_interrupted_command(moment: Moment, place: Place, tmp_path: Path) -> None:
    out = tmp_path / "place" / "out"
    ended = disturbed(place, moment, signal.SIGINT, out)
    if ended.status != 0:  # it was faster than the clock
        assert ended.status == 130, ended.stderr
        assert ended.stdout == ""
        assert ended.stderr.splitlines()[-1] == "glowq: interrupted"
        assert "Traceback" not in ended.stderr
    left = {path.name for path in out.parent.iterdir()} - {"out"}
    assert left <= ({"out.resume"} if moment.name == "correct --resume" else set())
    again(place, moment, out)
