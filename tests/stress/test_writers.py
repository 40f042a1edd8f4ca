"""Two runs of one command that write the same folder at the same time: the folder is whole, and both say what is so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from glowq.utils.manifest import contents_of
from support.disturbed import Ended, Server, digests
from support.writing import sources, words

NAMES = ["correct", "correct --resume", "correct --format full", "select", "export peft", "export merged", "import"]
ROUNDS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources(tmp_path_factory.mktemp("writers"))


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Server(tmp_path_factory.mktemp(f"logs{number}"))) for number in (1, 2)]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "select" else [pytest.mark.long]) for n in NAMES])
def test_two_writers(name: str, folder: Path, servers: list[Server], tmp_path: Path) -> None:
    alone = tmp_path / "alone" / "out"
    alone.parent.mkdir()
    assert servers[0].run(words(name, folder, alone), alone.parent).status == 0
    out = tmp_path / "together" / "out"
    out.parent.mkdir()

    def write(server: Server) -> Ended:
        return server.run(words(name, folder, out), out.parent)

    for _ in range(ROUNDS):
        with ThreadPoolExecutor(2) as pool:
            ended = list(pool.map(write, servers))
        assert 0 in [one.status for one in ended]
        for one in ended:
            if one.status:
                assert one.status == 1, one.stderr
                assert re.search("glowq: error: another run (keeps its finished blocks|has just written)", one.stderr)
        assert digests(out) == digests(alone)
        assert not contents_of(out).foreign
        assert [path.name for path in out.parent.iterdir()] == ["out"]
