"""Write output folders completely or not at all, and replace only an earlier result of the same kind."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from pathlib import Path

from ..errors import GlowQError, OutputError
from .manifest import Stamp, contents_of, remove_files, stamps, write_manifest
from .scratch import EARLIER, NEW, held, scratch_folder, sweep

__all__ = ["EXPORT_MANIFEST", "Kind", "check_output", "is_full", "output_path", "reason_of", "write_directory"]

EXPORT_MANIFEST = "glowq_export.json"  # describes an export, and lists every other file of it
_LONGEST_NAME = 200  # bytes; file systems take 255, and names of temporary folders and of OUT.resume are longer

_RENAME_EXCHANGE, _AT_FDCWD = 2, -100  # of Linux's <fcntl.h>


class Kind(Enum):
    """What a result folder holds. A result replaces only an earlier result of the same kind."""

    MODEL = "model"
    COMPARISON = "comparison"
    EXPORT = "export"
    TIMING = "timing"


class _Occupied(OutputError):
    """The output folder holds something that must not be removed."""


def write_directory(
    target: Path, write: Callable[[Path], None], *, kind: Kind = Kind.MODEL, checked: bool = False
) -> None:
    """Let `write` fill a temporary folder next to `target`, then rename that folder to `target`.

    If anything fails, nothing is written, and an earlier result stays as it was. If the process is killed, `target`
    holds the earlier result or the new one. On a system that cannot swap two folders in one step, there is a moment in
    which there is no `target`; the next run that writes into its parent puts the earlier result back.

    Args:
        target: final folder. It must not exist, or be empty, or hold only what glowq wrote there for an earlier result
            of the same kind: files that the manifest of that result lists, unchanged.
        write: fills the folder that is passed to it.
        kind: what the folder will hold.
        checked: `check_output` accepted `target` before the work. If somebody has put something there since, the result
            is not lost: it is written to a new folder, which the error names.

    Raises:
        OutputError: `target` holds other files, its parent cannot be written, or the disk is full.
    """
    target = output_path(target)
    if not checked:
        check_output(target, kind=kind)
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(target) as scratch:
            write(scratch / NEW)
            write_manifest(scratch / NEW, kind.value)
            with held(target):
                _move_into_place(scratch, target, kind)
        missing = []
    except GlowQError:
        raise
    except Exception as error:
        if not is_full(error) and not isinstance(error, OSError):
            raise
        raise OutputError(f"cannot write {target}: {reason_of(error)}. Nothing was left behind.") from error
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def check_output(target: Path, *, kind: Kind = Kind.MODEL) -> None:
    """Check, before hours of work, that `write_directory` will accept `target`.

    What killed runs left next to `target` is removed first, and an earlier result that they had moved away is put back.

    Raises:
        OutputError: see `write_directory`.
    """
    target = output_path(target)
    sweep(target.parent)
    parent = target.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{parent} is not writable; choose another folder.")
    if not os.path.lexists(target):
        return
    try:
        with held(target):
            if os.path.lexists(target):
                _own_files(target, kind)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {target}: {reason_of(error)}.") from error


def is_full(error: BaseException) -> bool:
    """Whether the disk is full; safetensors and tokenizers (both Rust) report this only in their message."""
    full = "No space left on device", "Disk quota exceeded"
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(text in str(error) for text in full)


def reason_of(error: BaseException) -> str:
    """Why a file could not be written, in words for a message."""
    return "the disk is full" if is_full(error) else str(error)


def output_path(target: str | os.PathLike[str]) -> Path:
    """The absolute path of an output folder, without links: a link is followed, not replaced.

    Raises:
        OutputError: there can be no such path, or its name is too long for the names of temporary folders.
    """
    try:
        found = Path(target).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, or a loop of links
        raise OutputError(
            f"{os.fspath(target)!r} cannot be the path of a folder ({error}); choose another folder."
        ) from None
    if len(os.fsencode(found.name)) > _LONGEST_NAME:
        raise OutputError(f"the name of {found} has more than {_LONGEST_NAME} bytes; choose a shorter one.")
    return found


def _own_files(target: Path, kind: Kind) -> dict[str, Stamp]:
    """The files of an earlier result in `target`: relative path -> stamp.

    Raises:
        OutputError: `target` is no folder, cannot be replaced, or holds anything else.
    """
    if not target.is_dir():
        raise _Occupied(f"{target} is {'a file' if target.is_file() else 'no folder'}; expected a folder to write to.")
    if os.path.ismount(target):
        raise _Occupied(f"{target} is a mounted disk, which cannot be replaced in one piece; choose a folder in it.")
    try:
        found = contents_of(target)
    except OSError as error:
        raise _Occupied(
            f"{target} cannot be read ({error}); choose another folder, so that nothing is lost."
        ) from error
    if found.foreign:
        name, why = next(iter(found.foreign.items()))
        how = "move it, or choose another folder, so that nothing is lost."
        if found.kind is None:
            how = (
                "it may be yours, or of an earlier version of glowq. Remove the folder yourself if you do not need it, "
                "or choose another folder."
            )
        raise _Occupied(f"{target} is not empty and holds {name!r}, {why}; {how}")
    if found.kind not in (None, kind.value):
        raise _Occupied(
            f"{target} is not empty and holds a result of another kind ({found.kind}, not {kind.value}); choose "
            "another folder, so that nothing is lost."
        )
    return found.own


def _move_into_place(scratch: Path, target: Path, kind: Kind) -> None:
    """Put the finished folder at `target`, and remove the earlier result that was there.

    Raises:
        OutputError: `target` holds something else by now; then the finished folder is next to it.
    """
    fresh, earlier = scratch / NEW, scratch / EARLIER
    try:
        try:
            fresh.rename(target)  # also onto an empty folder, on most systems
            return
        except OSError:
            if not os.path.lexists(target):
                raise
        own = _own_files(target, kind)
        old = fresh if own and _exchange(fresh, target) else earlier
        if old is earlier:  # if the second rename fails, leaving the temporary folder undoes the first one
            target.rename(earlier)
            fresh.rename(target)
        late = [name for name, stamp in stamps(old).items() if stamp is None or stamp != own.get(name)]
        if late:
            if not (old is fresh and _exchange(fresh, target)):
                target.rename(fresh)
                earlier.rename(target)
            raise _Occupied(f"{target} holds {late[0]!r}, which was written while this result was moved there.")
        remove_files(old, own)
    except _Occupied as error:
        beside = _free_name(target)
        fresh.rename(beside)
        raise OutputError(f"{error} Nothing there was changed, and the new result is whole in {beside}.") from error


def _free_name(target: Path) -> Path:
    number, found = 1, target.with_name(f"{target.name}.new")
    while os.path.lexists(found):
        number += 1
        found = target.with_name(f"{target.name}.new-{number}")
    return found


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step. False if the system or the file system cannot, and nothing was changed."""
    if not sys.platform.startswith("linux"):
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:  # an old C library
        return False
    paths = _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second)
    return bool(function(*paths, _RENAME_EXCHANGE) == 0)
