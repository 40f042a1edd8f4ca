"""A full disk ends every command that writes with one line and status 1, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import typer

from glowq.cli.output import session
from glowq.pipeline.block_store import remove_blocks
from support.cli import call
from support.tiny import corrected, library_texts, tiny_llama

SIZES = ["--calibration-tokens", "256", "--sequence-length", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its correction, the correction as an adapter, and texts."""
    folder = tmp_path_factory.mktemp("full")
    _, correction = corrected(tiny_llama(folder / "model"), "nf4", method="svd", rank=2)
    correction.save_pretrained(folder / "corrected")
    assert call("export", folder / "corrected", "--to", "peft", "--output", folder / "adapter").exit_code == 0
    library_texts(folder)
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The root of a disk with 16 KiB."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("only root may mount a disk")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


CORRECT = "correct MODEL --base nf4 --method svd --rank 2 --calibration TRAIN --output OUT"
COMMANDS = {
    "correct": CORRECT,
    "correct --resume": f"{CORRECT} --resume",
    "correct --format full": f"{CORRECT} --format full",
    "select": "select CORRECTED --budget 1% --output OUT",
    "export peft": "export CORRECTED --to peft --output OUT",
    "export merged": "export CORRECTED --to merged --output OUT",
    "compare": "compare MODEL --base nf4 --calibration TRAIN --data TEST --methods svd --budgets 5% --tokens 256 "
    "--output OUT",
    "bench": "bench CORRECTED --batch-sizes 1 --lengths 4 --new-tokens 1 --repeats 1 --output OUT",
    "import": "import ADAPTER --base-model MODEL --base nf4 --output OUT",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_one_line_and_nothing_is_left(name: str, folder: Path, disk: Path) -> None:
    names = {word.upper(): folder / word for word in ("model", "corrected", "adapter")}
    names |= {"TRAIN": folder / "train.txt", "TEST": folder / "test.txt", "OUT": disk / "out"}
    words: list[Any] = [names.get(word, word) for word in COMMANDS[name].split()]
    sizes = SIZES if words[0] in ("correct", "compare") else []
    done = call(*words, *sizes, "--json")
    assert done.exit_code == 1, done.exception
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("glowq: error")]
    assert re.search(r"cannot write .*out(\.resume)?: the disk is full\.", line)
    if name == "correct --resume":  # what fitted goes on to be useful
        assert "run the same command again" in line
        remove_blocks(disk / "out.resume")
    assert not [*disk.iterdir()]


@pytest.mark.parametrize("name", ["correct", "export peft"])
def test_a_full_disk_for_temporary_files(
    name: str, folder: Path, disk: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    (disk / "everything").write_bytes(bytes(2**14))
    out = tmp_path_factory.mktemp("elsewhere") / "out"
    names = {"MODEL": folder / "model", "CORRECTED": folder / "corrected", "TRAIN": folder / "train.txt", "OUT": out}
    done = call(*(names.get(word, word) for word in COMMANDS[name].split()), *(SIZES if name == "correct" else []))
    if done.exit_code:  # nothing may have been needed
        assert re.search(r"glowq: error: cannot write .*: the disk is full\.", done.stderr)
        assert not [*out.parent.iterdir()]
    assert [path.name for path in disk.iterdir()] == ["everything"]


def _print_to_a_full_disk(stderr: Path) -> None:
    """Print a result as the program does: called in a process of its own."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, closefd=False)
    try:
        with session(True) as show:
            show({"figures": [*range(10**4)]}, dict)
    except typer.Exit as ended:
        sys.exit(ended.exit_code)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_full_disk_for_the_result_itself(tmp_path: Path) -> None:
    process = get_context("fork").Process(target=_print_to_a_full_disk, args=(tmp_path / "stderr",))
    process.start()
    process.join()
    assert process.exitcode == 1
    expected = "glowq: error: cannot write the result to the standard output: the disk is full.\n"
    assert (tmp_path / "stderr").read_text() == expected
