"""`glowq compare --resume`: an interrupted comparison goes on with the cells that it had finished."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glowq.calibration import distillation
from glowq.evaluation import cloze, scores
from glowq.pipeline.block_solver import BlockSolver
from glowq.pipeline.block_store import BlockFolder
from glowq.pipeline.compare import alternatives
from support.cli import call

ASKED = [
    "--methods",
    "svd,qera,eora,glowq",
    "--budgets",
    "4%,9%",
    "--factor-dtypes",
    "int8,int4",
    "--distill",
    "2",
    "--alternatives",
]
SIZES = ["--calibration-tokens", "1024", "--tokens", "512", "--sequence-length", "128", "--cloze", "4", "--seed", "3"]


@pytest.fixture(scope="module", autouse=True)
def small_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scores, "_BATCH_TOKENS", 256)
        patched.setattr(cloze, "_BATCH_TOKENS", 640)
        yield


@pytest.fixture(scope="module")
def command(compared_folder: Path) -> list[Any]:
    texts = ["--calibration", compared_folder / "train.txt", "--data", compared_folder / "test.txt"]
    return ["compare", compared_folder / "model", "--base", "torchao-int3", *texts, *SIZES, *ASKED]


@pytest.fixture(scope="module")
def wanted(command: list[Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a comparison that was not interrupted."""
    folder = tmp_path_factory.mktemp("resume") / "wanted"
    done = call(*command, "--output", folder)
    assert done.exit_code == 0, done.stderr
    return files(folder)


def files(folder: Path) -> dict[str, bytes]:
    found = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".json", ".md", ".png")}
    stored = json.loads(found.pop("compare.json"))
    stored.pop("command")  # --resume is in it
    return {name: content for name, content in found.items() if name == "bytes.png"} | {
        "compare.json": json.dumps(stored).encode()
    }


class Interrupted(Exception):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: int) -> list[int]:
    """Let calls of a function fail after the first `after`; returns a list that grows by one for every call."""
    calls: list[int] = []
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if len(calls) == after:
            raise Interrupted
        calls.append(len(calls))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


PLACES = [
    (BlockSolver, "_factors_of", 5),
    (distillation, "distill", 1),
    (scores, "_score_batch", 1),
    (alternatives, "measure_wider", 0),
    (cloze, "_answer_batch", 1),
]


def test_every_interruption_goes_on_to_the_same_result(
    command: list[Any], wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    resumed = [*command, "--output", out, "--resume"]
    for owner, name, after in PLACES:
        with monkeypatch.context() as patched:
            interrupt(patched, owner, name, after)
            assert isinstance(call(*resumed).exception, Interrupted), name
        assert not out.exists()
        assert (tmp_path / "out.resume").is_dir()
    with monkeypatch.context() as patched:
        again = [interrupt(patched, owner, name, 1000) for owner, name, _ in PLACES]
        done = call(*resumed)
    assert done.exit_code == 0, done.stderr
    *others, answers = map(len, again)
    assert others == [0, 0, 0, 0]  # nothing that was finished is computed again
    assert answers == 1  # one of the two batches
    assert files(out) == wanted
    assert not (tmp_path / "out.resume").exists()


@pytest.mark.parametrize(
    "other", [["--seed", "4"], ["--distill", "1"], ["--budgets", "4%"], ["--base", "torchao-int4"]]
)
def test_cells_of_another_comparison_are_not_used(
    command: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: list[str]
) -> None:
    resumed = [*command, "--output", tmp_path / "out", "--resume"]
    with monkeypatch.context() as patched:
        interrupt(patched, scores, "_score_batch", 1)
        assert isinstance(call(*resumed).exception, Interrupted)
    with monkeypatch.context() as patched:
        solved = interrupt(patched, BlockSolver, "_factors_of", 1000)
        interrupt(patched, scores, "_score_batch", 0)
        assert isinstance(call(*resumed, *other).exception, Interrupted)
    assert solved


@pytest.mark.parametrize("value", [3, {"gains": 1}, [["no group", 1, 2.0]]])
def test_cells_that_hold_something_else_are_made_again(
    command: list[Any], wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    """With the digest and the key of this comparison, which somebody computed."""
    out = tmp_path / "out"
    original = BlockFolder.write

    def other(folder: BlockFolder, block: str, key: str, factors: Any = (), **real: Any) -> None:
        original(folder, block, key, factors, value)

    with monkeypatch.context() as patched:
        patched.setattr(BlockFolder, "write", other)
        interrupt(patched, cloze, "_answer_batch", 1)
        assert isinstance(call(*command, "--output", out, "--resume").exception, Interrupted)
    done = call(*command, "--output", out, "--resume")
    assert done.exit_code == 0, done.stderr
    assert files(out) == wanted


def test_the_cells_need_a_place(command: list[Any]) -> None:
    done = call(*command, "--resume")
    assert done.exit_code == 1
    assert "--resume keeps finished cells in DIR.resume: name DIR with --output" in done.stderr


def test_a_folder_of_other_files_is_refused_before_anything_is_loaded(command: list[Any], tmp_path: Path) -> None:
    (tmp_path / "out.resume").mkdir()
    (tmp_path / "out.resume" / "diary").write_text("mine")
    done = call(*command, "--output", tmp_path / "out", "--resume")
    assert done.exit_code == 1
    assert "holds 'diary', which is no finished block" in done.stderr
    assert (tmp_path / "out.resume" / "diary").read_text() == "mine"
