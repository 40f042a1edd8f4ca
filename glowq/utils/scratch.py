"""Temporary folders. A run that is killed leaves its folder, and the next run removes it.

A running process holds the lock on a file in its folder. The system releases the lock when the process ends, however it
ends. So a folder whose lock can be taken belongs to no process, on this machine or on another one that shares the disk.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from ..errors import OutputError
from .manifest import MANIFEST, contents_of, remove_files

__all__ = ["EARLIER", "NEW", "held", "scratch_folder", "sweep", "temporary_folder", "try_lock", "unlock"]

NEW = "new"
"""Name of the folder that is being filled, within a temporary folder."""
EARLIER = "earlier"
"""Name of the result that is being replaced, within a temporary folder."""

_LOCK = "lock"
_SUFFIX = ".glowq"
_NAME = re.compile(r"\.(?P<target>.+)\.[a-z0-9_]{8}" + re.escape(_SUFFIX), re.DOTALL)  # as mkdtemp draws it

_MOVING = ".moving" + _SUFFIX  # after the name of a folder: file of the lock of `held`

_logger = logging.getLogger(__name__)


def try_lock(file: Path) -> BaseFileLock | None:
    """Create `file` if it is missing, and lock it; None if another process, or another part of this one, holds it."""
    lock = FileLock(file, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def unlock(lock: BaseFileLock) -> None:
    """Delete the file of a lock and release it."""
    if sys.platform == "win32":  # an open file cannot be deleted there
        lock.release()
    with suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()


@contextmanager
def held(target: Path) -> Iterator[None]:
    """Wait until no other process moves or checks the folder `target`, and let none do so inside this context.

    Raises:
        OSError: the file of the lock cannot be created next to `target`.
    """
    lock = FileLock(target.with_name(f".{target.name}{_MOVING}"), thread_local=False)
    lock.acquire()
    try:
        yield
    finally:
        unlock(lock)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A temporary folder next to `target`, with an empty folder `NEW` in it. It is removed at the end.

    If it then holds an earlier result (`EARLIER`) and there is no `target`, the earlier result is first put back.

    Raises:
        OutputError: an earlier result could not be put back; the message says where it is.
        OSError: the folder cannot be created.
    """
    sweep(target.parent)
    created: list[tuple[Path, BaseFileLock]] = []
    try:
        with _uninterrupted():
            created.append(_create(target))
        folder, _ = created[0]
        (folder / NEW).mkdir()
        yield folder
    finally:
        with _uninterrupted():
            for folder, lock in created:
                try:
                    _discard(folder, target)
                finally:
                    _remove(folder, lock)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a Ctrl-C inside this context take effect at its end, so that a folder is not left half created or removed."""
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    waiting: list[tuple[int, Any]] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting and callable(handler):
            handler(*waiting[0])


@contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """An empty folder in the system's folder for temporary files, removed at the end. `purpose` is part of its name."""
    with scratch_folder(Path(tempfile.gettempdir()) / f"glowq-{purpose}") as folder:
        yield folder / NEW


def sweep(parent: Path) -> None:
    """Remove the temporary folders that ended processes left in `parent`, and put back what they had moved away."""
    try:
        names = [entry.name for entry in os.scandir(parent) if entry.name.endswith(_SUFFIX)]
    except OSError:
        return  # there is no such folder, or it cannot be read
    for name in names:
        match = _NAME.fullmatch(name)
        try:
            if match is not None:
                _sweep_one(parent / name, parent / match["target"])
            elif name.startswith(".") and name.endswith(_MOVING):
                _sweep_lock(parent / name)
        except (OSError, OutputError) as error:  # another run removes it, or it is not ours to remove
            _logger.debug("%s stays: %s", parent / name, error)


def _sweep_lock(file: Path) -> None:
    if file.is_symlink() or not file.is_file() or not _is_mine(file) or file.stat().st_size:
        return  # the file of a lock is empty
    lock = try_lock(file)
    if lock is not None:
        unlock(lock)


def _is_mine(path: Path) -> bool:
    return not hasattr(os, "geteuid") or path.lstat().st_uid == os.geteuid()


def _sweep_one(folder: Path, target: Path) -> None:
    if folder.is_symlink() or not _is_mine(folder):
        return
    if not (folder / _LOCK).is_file():
        folder.rmdir()  # a process was killed before it locked the folder; one that lives creates another
        return
    lock = try_lock(folder / _LOCK)
    if lock is None:
        return
    try:
        _discard(folder, target)
    finally:
        _remove(folder, lock)


def _create(target: Path) -> tuple[Path, BaseFileLock]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_SUFFIX, dir=target.parent))
        try:
            lock = try_lock(folder / _LOCK)
            if lock is not None:
                return folder, lock
        except FileNotFoundError:  # another process removed the folder, because it was not locked yet
            continue
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _discard(folder: Path, target: Path) -> None:
    """Remove what a temporary folder holds, or put it back."""
    new, earlier = folder / NEW, folder / EARLIER
    try:
        if earlier.exists() and not os.path.lexists(target):
            earlier.rename(target)
    except OSError as error:
        raise OutputError(
            f"cannot write {target}, and what was there could not be put back ({error}): the earlier result is whole "
            f"in {earlier}; move it back to {target}."
        ) from error
    finally:
        if new.exists() and not os.path.lexists(new / MANIFEST):
            shutil.rmtree(new)  # not complete: the manifest is written last
        elif new.exists():
            remove_files(new, contents_of(new).own)
    if earlier.exists():  # and `target` is the new result
        remove_files(earlier, contents_of(earlier).own)


def _remove(folder: Path, lock: BaseFileLock) -> None:
    """Remove an empty temporary folder with its lock. Otherwise release the lock, and say what is left."""
    try:
        left = [entry for entry in folder.iterdir() if entry.name != _LOCK]
    except OSError:
        left = []
    if left:
        _logger.warning("%s stays: it holds what glowq may not remove. Move what you need from there.", left[0])
        lock.release()
        return
    unlock(lock)
    with suppress(OSError):
        folder.rmdir()
