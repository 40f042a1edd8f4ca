"""Output folders: nothing that glowq did not write is removed, and no earlier result is lost, whatever fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from glowq.errors import OutputError
from glowq.utils import output
from glowq.utils.manifest import MANIFEST
from glowq.utils.output import Kind, check_output, write_directory


def write(word: str) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "bench.json").write_text(word)
        (folder / "inner").mkdir()
        (folder / "inner" / "table.md").write_text(word)

    return fill


def replace(folder: Path, **options: Any) -> None:
    write_directory(folder, write("new"), kind=Kind.TIMING, **options)


def is_whole(folder: Path, word: str) -> bool:
    return (folder / "bench.json").read_text() == (folder / "inner" / "table.md").read_text() == word


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "result"
    write_directory(folder, write("old"), kind=Kind.TIMING)
    return folder


@pytest.fixture(params=["one step", "two renames"])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the system replaces a folder; not every file system can do it in one step."""
    if request.param == "two renames":
        monkeypatch.setattr(output, "_exchange", lambda first, second: False)
    return str(request.param)


@pytest.fixture
def renames(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace Path.rename, so that its first calls do what is given: raise an exception, call a function, or rename."""
    monkeypatch.setattr(output, "_exchange", lambda first, second: False)

    def plan(*first: BaseException | Callable[[], Any] | None) -> None:
        # The new folder cannot be renamed onto a result that is not empty; this call comes before the two renames.
        real, left = Path.rename, [None, *first]

        def rename(self: Path, to: Any) -> Path:
            action = left.pop(0) if left else None
            if isinstance(action, BaseException):
                raise action
            if action is not None:
                action()
            return real(self, to)

        monkeypatch.setattr(Path, "rename", rename)

    return plan


def test_a_result_replaces_the_earlier_one_and_leaves_nothing_beside_it(target: Path, step: str) -> None:
    replace(target)
    assert is_whole(target, "new")
    assert [*target.parent.iterdir()] == [target]


def test_the_same_result_has_the_same_bytes(target: Path) -> None:
    first = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    write_directory(target, write("old"), kind=Kind.TIMING)
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == first


def test_an_empty_folder_and_a_link_to_a_result_are_accepted(target: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(target, target_is_directory=True)
    for name in ("empty", "link"):
        replace(tmp_path / name)
        assert is_whole(tmp_path / name, "new")
    assert is_whole(target, "new")


def test_missing_parents_are_created_and_removed_again_after_a_failure(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, "the disk says no")

    with pytest.raises(OutputError, match=r"the disk says no.* Nothing was left behind"):
        write_directory(tmp_path / "a" / "b" / "out", fail)
    assert not [*tmp_path.iterdir()]
    replace(tmp_path / "a" / "b" / "out")
    assert is_whole(tmp_path / "a" / "b" / "out", "new")


class TestWhatIsNotOurs:
    NAMES = (
        "model_finetuned_by_me.safetensors",
        "word2vec.model",
        "tokenizer_my_backup.txt",
        "vocab.csv",
        "my_prompt.jinja",
        "table.md",
        "inner/notes.txt",
    )

    @pytest.mark.parametrize("name", NAMES)
    def test_a_file_in_an_earlier_result(self, target: Path, name: str) -> None:
        (target / name).write_text("mine")
        with pytest.raises(OutputError, match=rf"is not empty and holds '{name}', which glowq did not write; move it"):
            replace(target)
        assert (target / name).read_text() == "mine"
        assert is_whole(target, "old")

    def test_a_file_that_was_edited(self, target: Path) -> None:
        (target / "inner" / "table.md").write_text("my own words")
        with pytest.raises(OutputError, match=r"holds 'inner/table.md', which was changed after glowq wrote it"):
            replace(target)
        assert (target / "inner" / "table.md").read_text() == "my own words"

    @pytest.mark.parametrize("kind", ["pipe", "socket", "link", "folder"])
    def test_what_is_no_file(self, target: Path, kind: str) -> None:
        """Even under a name that the manifest lists."""
        path = target / "bench.json"
        text = path.read_text()
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as opened:
                opened.bind(str(path))
        elif kind == "link":
            (target.parent / "mine").write_text(text)
            path.symlink_to(target.parent / "mine")
        else:
            path.mkdir()
        with pytest.raises(OutputError, match=r"holds 'bench.json', which glowq did not write"):
            replace(target)
        assert os.path.lexists(path)

    def test_a_result_without_a_manifest(self, target: Path) -> None:
        """One of an earlier version, or one that was saved by a library alone."""
        (target / MANIFEST).unlink()
        with pytest.raises(OutputError, match=r"which no manifest of glowq lists; .*Remove the folder yourself if"):
            replace(target)
        assert is_whole(target, "old")

    @pytest.mark.parametrize(
        "text",
        ["", "[", "[]", "{}", '{"kind": 1, "files": {}}', "9" * 5000, "[" * 10**5, "null", '{"files": 3, "kind": "x"}'],
    )
    def test_a_manifest_that_glowq_did_not_write(self, target: Path, text: str) -> None:
        (target / MANIFEST).write_text(text)
        with pytest.raises(OutputError, match="which no manifest of glowq lists"):
            replace(target)
        assert (target / MANIFEST).read_text() == text

    def test_a_manifest_that_was_edited(self, target: Path) -> None:
        stored = json.loads((target / MANIFEST).read_text())
        (target / MANIFEST).write_text(json.dumps({**stored, "note": "mine"}))
        with pytest.raises(OutputError, match="which no manifest of glowq lists"):
            replace(target)

    def test_a_manifest_names_nothing_outside_its_folder(self, target: Path) -> None:
        (target.parent / "diary").write_text("old")
        stored = json.loads((target / MANIFEST).read_text())
        stored["files"]["../diary"] = stored["files"]["bench.json"]
        (target / MANIFEST).write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
        replace(target)
        assert (target.parent / "diary").read_text() == "old"

    def test_a_result_of_another_kind(self, target: Path) -> None:
        with pytest.raises(OutputError, match=r"holds a result of another kind \(timing, not model\)"):
            write_directory(target, write("new"))
        assert is_whole(target, "old")

    @pytest.mark.parametrize("kind", ["file", "pipe", "socket", "loop", "device"])
    def test_an_output_that_is_no_folder(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "out"
        if kind == "file":
            path.write_text("mine")
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as opened:
                opened.bind(str(path))
        elif kind == "loop":
            path.symlink_to(path)
        else:
            path = Path("/dev/null")
        for attempt in (check_output, replace):
            with pytest.raises(OutputError, match=r"expected a folder to write to|cannot be the path of a folder"):
                attempt(path)
        assert os.path.lexists(path)

    @pytest.mark.parametrize("name", ["a\0b", "x" * 201])
    def test_a_name_that_no_folder_can_have(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(OutputError, match=r"cannot be the path of a folder|more than 200 bytes"):
            check_output(tmp_path / name)


class TestPutThereMeanwhile:
    """Work of hours is not lost because somebody put a file into the output folder meanwhile, nor is that file."""

    @pytest.mark.parametrize("was", ["result", "nothing", "empty"])
    def test_during_the_work(self, target: Path, was: str, step: str) -> None:
        if was != "result":
            shutil.rmtree(target)
        if was == "empty":
            target.mkdir()
        check_output(target, kind=Kind.TIMING)
        target.mkdir(exist_ok=True)
        (target / "diary").write_text("mine")
        with pytest.raises(OutputError, match=r"holds 'diary'.* the new result is whole in .*result\.new\."):
            replace(target, checked=True)
        assert (target / "diary").read_text() == "mine"
        assert is_whole(target.with_name("result.new"), "new")
        assert {path.name for path in target.parent.iterdir()} == {"result", "result.new"}
        with pytest.raises(OutputError, match=r"is whole in .*result\.new-2\."):
            replace(target, checked=True)

    def test_at_the_very_last_moment(self, target: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
        check = output._own_files

        def own_files(*arguments: Any) -> Any:
            found = check(*arguments)
            (target / "diary").write_text("mine")
            (target / "bench.json").write_text("edited")
            return found

        monkeypatch.setattr(output, "_own_files", own_files)
        with pytest.raises(OutputError, match=r"written while this result was moved there.* whole in .*result\.new"):
            replace(target, checked=True)
        assert (target / "diary").read_text() == "mine"
        assert (target / "bench.json").read_text() == "edited"
        assert is_whole(target.with_name("result.new"), "new")
        assert {path.name for path in target.parent.iterdir()} == {"result", "result.new"}

    def test_a_result_of_another_run_is_replaced(self, target: Path, step: str) -> None:
        shutil.rmtree(target)

        def fill(folder: Path) -> None:
            write_directory(target, write("theirs"), kind=Kind.TIMING)
            write("ours")(folder)

        write_directory(target, fill, kind=Kind.TIMING)
        assert is_whole(target, "ours")
        assert [*target.parent.iterdir()] == [target]


class TestFailures:
    def test_the_earlier_result_is_put_back(self, target: Path, renames: Callable[..., None]) -> None:
        renames(None, OSError(errno.EIO, "the disk says no"))
        with pytest.raises(OutputError, match=r"cannot write .*the disk says no.*\. Nothing was left behind"):
            replace(target)
        assert is_whole(target, "old")
        assert [*target.parent.iterdir()] == [target]

    def test_an_interrupt_puts_the_earlier_result_back(self, target: Path, renames: Callable[..., None]) -> None:
        renames(None, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            replace(target)
        assert is_whole(target, "old")
        assert [*target.parent.iterdir()] == [target]

    @pytest.mark.parametrize("again", [OSError(errno.EIO, "no again"), KeyboardInterrupt()])
    def test_one_that_cannot_be_put_back_is_kept_and_put_back_by_the_next_run(
        self, target: Path, renames: Callable[..., None], again: BaseException
    ) -> None:
        renames(None, OSError(errno.EIO, "no"), again)
        with pytest.raises((OutputError, KeyboardInterrupt)) as refusal:
            replace(target)
        (kept,) = target.parent.rglob("bench.json")
        assert is_whole(kept.parent, "old")
        if isinstance(again, OSError):
            assert f"the earlier result is whole in {kept.parent}; move it back to {target}" in str(refusal.value)
        check_output(target.with_name("another"))
        assert is_whole(target, "old")
        assert [*target.parent.iterdir()] == [target]

    # If the disk is full, safetensors and tokenizers raise their own errors instead of OSError.
    @pytest.mark.parametrize("kind", [SafetensorError, Exception, OSError])
    def test_a_full_disk(self, kind: type[Exception], target: Path) -> None:
        def fill(folder: Path) -> None:
            raise kind("Error while serializing: I/O error: No space left on device (os error 28)")

        with pytest.raises(OutputError, match=r"cannot write .*result: the disk is full\. Nothing was left behind"):
            write_directory(target, fill, kind=Kind.TIMING)
        assert is_whole(target, "old")
        assert [*target.parent.iterdir()] == [target]

    def test_other_errors_of_the_writer_come_through(self, target: Path) -> None:
        def fill(folder: Path) -> None:
            raise SafetensorError("Error while serializing: invalid header")

        with pytest.raises(SafetensorError, match="invalid header"):
            write_directory(target, fill, kind=Kind.TIMING)
        assert [*target.parent.iterdir()] == [target]


def _killed(target: Path, moment: str, in_one_step: bool) -> None:
    """Replace a result and be killed at the given moment: called in a process of its own."""

    def kill(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def fill(folder: Path) -> None:
        write("new")(folder)
        if moment == "writing":
            kill()
        if moment == "listing":
            Path.write_text = lambda self, text, **_: kill(write_text(self, text[:10]))  # type: ignore[method-assign]

    exchange, remove, rename, write_text = output._exchange, output.remove_files, Path.rename, Path.write_text
    if not in_one_step:
        output._exchange = lambda first, second: False
    elif moment == "between":
        output._exchange = lambda first, second: exchange(first, second) and kill()
    if moment == "removing":
        output.remove_files = lambda folder, files: kill(remove(folder, dict([*files.items()][:1])))
    if moment == "moving":
        output._move_into_place = kill
    if moment == "between" and not in_one_step:
        Path.rename = lambda self, to: kill() if rename(self, to).name == "earlier" else to  # type: ignore[method-assign]
    write_directory(target, fill, kind=Kind.TIMING)


def _write_often(target: Path, word: str) -> None:
    for _ in range(10):
        write_directory(target, write(word), kind=Kind.TIMING)


def test_two_writers_replace_each_other(target: Path, step: str) -> None:
    writers = [get_context("fork").Process(target=_write_often, args=(target, word)) for word in ("one", "two")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert any(is_whole(target, word) for word in ("one", "two"))
    assert [*target.parent.iterdir()] == [target]


@pytest.mark.parametrize("in_one_step", [True, False])
@pytest.mark.parametrize("moment", ["writing", "listing", "moving", "between", "removing"])
def test_a_killed_run_loses_nothing_and_leaves_nothing_after_the_next(
    target: Path, moment: str, in_one_step: bool
) -> None:
    process = get_context("fork").Process(target=_killed, args=(target, moment, in_one_step))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if in_one_step or moment != "between":
        assert is_whole(target, "old" if moment in ("writing", "listing", "moving") else "new")
    assert [*target.parent.iterdir()] != [target]
    check_output(target.with_name("another"))  # the next run may write to another folder
    assert is_whole(target, "new" if moment == "removing" or (moment == "between" and in_one_step) else "old")
    assert [*target.parent.iterdir()] == [target]
    replace(target)
    assert is_whole(target, "new")
