"""Every command that writes a folder: it removes nobody's files, and a full disk ends it with one line and status 1."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
import typer

from glowq.cli.output import session
from glowq.pipeline.block_store import open_blocks, remove_blocks
from support.writing import COMMANDS, run, sources


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources(tmp_path_factory.mktemp("full"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The root of a disk with 16 KiB."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("only root may mount a disk")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_only_what_a_command_wrote_is_replaced(name: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(name, folder, out)
    assert done.exit_code == 0, done.stderr
    card = out / ("README.md" if (out / "README.md").exists() else "table.md")
    text = card.read_text()
    for file in (card, out / "tokenizer_my_backup.txt", out / "model_finetuned_by_me.safetensors"):
        file.write_text("mine")
        done = run(name, folder, out)
        assert done.exit_code == 1
        assert re.search(rf"glowq: error: \S+ is not empty and holds '{file.name}', which [^\n]*\n", done.stderr)
        assert file.read_text() == "mine"
        card.write_text(text)
        if file != card:
            file.unlink()
    assert run(name, folder, out).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_run_does_not_touch_the_blocks_of_the_first(folder: Path, tmp_path: Path) -> None:
    with open_blocks(tmp_path / "out.resume"):
        done = run("correct --resume", folder, tmp_path / "out")
        assert done.exit_code == 1
        assert re.fullmatch(r"glowq: error: another run keeps its finished blocks in [^\n]*\n", done.stderr)
    assert run("correct --resume", folder, tmp_path / "out").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(name: str, folder: Path, disk: Path) -> None:
    done = run(name, folder, disk / "out")
    assert done.exit_code == 1, done.exception
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("glowq: error")]
    assert re.search(r"cannot write .*out(\.resume)?: the disk is full\.", line)
    if name == "correct --resume":  # what fitted goes on to be useful
        assert "run the same command again" in line
        remove_blocks(disk / "out.resume")
    assert not [*disk.iterdir()]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_may_only_be_read(name: str, folder: Path, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    done = run(name, folder, disk / "out")
    assert done.exit_code == 1, done.exception
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("glowq: error")]
    assert line == f"glowq: error: {disk} is not writable; choose another folder."
    assert not [*disk.iterdir()]


@pytest.mark.parametrize("name", ["correct", "export peft"])
def test_a_full_disk_for_temporary_files(
    name: str, folder: Path, disk: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    (disk / "everything").write_bytes(bytes(2**14))
    out = tmp_path_factory.mktemp("elsewhere") / "out"
    done = run(name, folder, out)
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
