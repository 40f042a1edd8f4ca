"""Output folders: an earlier result is never lost, whatever fails while a new result replaces it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from glowq.errors import OutputError
from glowq.utils.output import Kind, write_directory


def write(word: str) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "bench.json").write_text(word)

    return fill


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "result"
    write_directory(folder, write("old"), kind=Kind.TIMING)
    return folder


def failing_renames(monkeypatch: pytest.MonkeyPatch, *failures: BaseException | None) -> None:
    """Replace Path.rename so that its first calls raise the given exceptions; None lets a call succeed."""
    real, left = Path.rename, list(failures)

    def rename(self: Path, to: Any) -> Path:
        failure = left.pop(0) if left else None
        if failure is not None:
            raise failure
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)


def test_a_result_replaces_the_earlier_one_and_leaves_nothing_beside_it(target: Path) -> None:
    write_directory(target, write("new"), kind=Kind.TIMING)
    assert (target / "bench.json").read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_the_earlier_result_is_put_back(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_renames(monkeypatch, None, OSError(errno.EIO, "the disk says no"))
    with pytest.raises(OutputError, match=r"cannot write .*the disk says no.*\. Nothing was left behind"):
        write_directory(target, write("new"), kind=Kind.TIMING)
    assert (target / "bench.json").read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_an_interrupt_puts_the_earlier_result_back(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_renames(monkeypatch, None, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        write_directory(target, write("new"), kind=Kind.TIMING)
    assert (target / "bench.json").read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_an_earlier_result_that_cannot_be_put_back_is_kept_and_named(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_renames(monkeypatch, None, OSError(errno.EIO, "no"), OSError(errno.EIO, "no again"))
    with pytest.raises(OutputError, match=r"the earlier result is whole in .*; move it back") as refusal:
        write_directory(target, write("new"), kind=Kind.TIMING)
    (kept,) = target.parent.rglob("bench.json")
    assert kept.read_text() == "old"
    assert str(kept.parent) in str(refusal.value)


# If the disk is full, safetensors and tokenizers raise their own errors instead of OSError.
@pytest.mark.parametrize("kind", [SafetensorError, Exception, OSError])
def test_a_full_disk(kind: type[Exception], target: Path) -> None:
    def fill(folder: Path) -> None:
        raise kind("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OutputError, match=r"cannot write .*result: the disk is full\. Nothing was left behind"):
        write_directory(target, fill, kind=Kind.TIMING)
    assert (target / "bench.json").read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_other_errors_of_the_writer_come_through(target: Path) -> None:
    def fill(folder: Path) -> None:
        raise SafetensorError("Error while serializing: invalid header")

    with pytest.raises(SafetensorError, match="invalid header"):
        write_directory(target, fill, kind=Kind.TIMING)
    assert list(target.parent.iterdir()) == [target]
