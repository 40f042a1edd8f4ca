"""Temporary folders: those of killed runs are removed, those of running ones and everybody else's are not."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from multiprocessing import get_context
from pathlib import Path

import pytest

from glowq.utils.scratch import held, scratch_folder, sweep, temporary_folder


def _hold(target: Path, say: object) -> None:
    with scratch_folder(target) as folder:
        (folder / "new" / "half").write_text("written")
        say.send(folder.name)  # type: ignore[attr-defined]
        say.recv()  # type: ignore[attr-defined]


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds a temporary folder next to tmp_path/out: (process, folder)."""
    mine, theirs = get_context("fork").Pipe()
    process = get_context("fork").Process(target=_hold, args=(tmp_path / "out", theirs))
    process.start()
    yield process, tmp_path / mine.recv()
    process.kill()
    process.join()


def test_a_folder_stays_while_its_process_runs_and_goes_when_it_was_killed(holder, tmp_path: Path) -> None:
    process, folder = holder
    sweep(tmp_path)
    assert (folder / "new" / "half").is_file()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert folder.exists()
    with scratch_folder(tmp_path / "another"):
        assert not folder.exists()
    assert not [*tmp_path.iterdir()]


def test_folders_of_one_process_do_not_remove_each_other(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "out") as first, scratch_folder(tmp_path / "out") as second:
        sweep(tmp_path)
        assert first != second
        assert (first / "new").is_dir()
        assert (second / "new").is_dir()


def test_only_folders_of_this_kind_are_looked_at(tmp_path: Path) -> None:
    for name in (".out.backup", ".out.abcdefgh", ".out.abcdefg1.glowq", ".out.abcdefg2.glowq", "out.abcdefgh.glowq"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "diary").write_text("mine")
    (tmp_path / ".out.abcdefg2.glowq" / "lock").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "lock").touch()
    (tmp_path / ".out.abcdefg3.glowq").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    before = {path for path in tmp_path.rglob("*") if path.name != "lock"}
    sweep(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.name != "lock"} == before
    assert (tmp_path / "elsewhere" / "lock").exists()


def test_a_lock_that_a_killed_run_left_goes(tmp_path: Path) -> None:
    (tmp_path / ".out.moving.glowq").touch()
    (tmp_path / ".diary.moving.glowq").write_text("mine")
    with held(tmp_path / "another"):
        sweep(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {".another.moving.glowq", ".diary.moving.glowq"}
    assert {path.name for path in tmp_path.iterdir()} == {".diary.moving.glowq"}


def test_a_folder_that_was_never_locked_goes(tmp_path: Path) -> None:
    (tmp_path / ".out.abcdefgh.glowq").mkdir()
    sweep(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_what_others_put_into_it_is_kept_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), scratch_folder(tmp_path / "out") as folder:
        (folder / "diary").write_text("mine")
    assert (folder / "diary").read_text() == "mine"
    assert f"{folder / 'diary'} stays" in caplog.text


def test_temporary_files_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder("reference") as folder:
        (folder / "weights").write_text("many")
        assert folder.parent.parent == tmp_path
    assert not [*tmp_path.iterdir()]
