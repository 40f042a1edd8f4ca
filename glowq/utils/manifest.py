"""The manifest of a result: which files glowq wrote into a folder, and their digests. Only these are ever removed."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MANIFEST", "Contents", "contents_of", "remove_files", "stamps", "write_manifest"]

MANIFEST = "glowq_manifest.json"
_LARGEST = 2**24  # bytes of a manifest; a larger file is none

Stamp = tuple[int, ...]
"""Device, inode, size, and times of the last changes: equal stamps of a regular file mean an unchanged file."""


@dataclass(frozen=True)
class Contents:
    """What a folder holds.

    Attributes:
        kind: the kind of result that the folder's manifest states; None if the folder has no manifest of glowq.
        own: relative path -> stamp of each file that the manifest lists with its present digest, and of the manifest.
        foreign: relative path -> why it must not be removed, for everything else: files, links and empty folders.
    """

    kind: str | None
    own: dict[str, Stamp]
    foreign: dict[str, str]


def write_manifest(folder: Path, kind: str) -> None:
    """List every file in `folder` with its SHA-256 in a manifest.

    Args:
        folder: a folder that glowq has just filled.
        kind: kind of the result; only a result of the same kind may replace it.
    """
    files = {name: _sha256(folder / name) for name, found in stamps(folder).items() if found is not None}
    part = folder / f"{MANIFEST}.part"
    part.write_text(_text(kind, files), encoding="utf-8")
    part.replace(folder / MANIFEST)  # a folder that has a manifest is complete, also if this process is killed here


def contents_of(folder: Path) -> Contents:
    """Compare everything in `folder` with its manifest. This reads every file that the manifest lists.

    Raises:
        OSError: a file cannot be read.
    """
    found = stamps(folder)
    kind, listed = _read(folder) if found.get(MANIFEST) is not None else (None, {})
    own: dict[str, Stamp] = {}
    foreign: dict[str, str] = {}
    for name, stamp in found.items():
        if name == MANIFEST and kind is not None and stamp is not None:
            own[name] = stamp
        elif kind is None:
            foreign[name] = "which no manifest of glowq lists"
        elif stamp is None or name not in listed:
            foreign[name] = "which glowq did not write"
        elif _sha256(folder / name) != listed[name]:
            foreign[name] = "which was changed after glowq wrote it"
        else:
            own[name] = stamp
    return Contents(kind, own, foreign)


def stamps(folder: Path) -> dict[str, Stamp | None]:
    """Everything that would be lost with `folder`: relative path -> stamp of a regular file; None for anything else.

    Anything else is a link, a special file such as a pipe, or an empty folder.
    """
    return {path.relative_to(folder).as_posix(): _stamp(path) for path in _leaves(folder)}


def remove_files(folder: Path, files: Mapping[str, Stamp]) -> None:
    """Remove files of `folder` that have not changed, and the folders that this leaves empty; also `folder` itself.

    Args:
        folder: the folder; whatever else it holds is kept.
        files: relative path -> stamp. The manifest is removed last, so that an interrupted removal can be continued.
    """
    for name in sorted(files, key=lambda name: (name == MANIFEST, name)):
        path = folder / name
        if os.path.lexists(path) and _stamp(path) == files[name]:
            path.unlink()
    inner = {parent for name in files for parent in (folder / name).parents if parent.is_relative_to(folder)}
    for path in sorted({*inner, folder}, reverse=True):  # inner folders first
        with suppress(OSError):  # it holds something else
            path.rmdir()


def _leaves(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        inner = [*_leaves(entry)] if entry.is_dir() and not entry.is_symlink() else []
        yield from inner or [entry]


def _stamp(path: Path) -> Stamp | None:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _text(kind: str, files: Mapping[str, str]) -> str:
    return json.dumps({"kind": kind, "files": dict(files)}, indent=2, sort_keys=True) + "\n"


def _read(folder: Path) -> tuple[str | None, dict[str, str]]:
    """Kind and files of a folder's manifest; (None, {}) unless the file is exactly as `write_manifest` writes it."""
    file = folder / MANIFEST
    if file.stat().st_size > _LARGEST:
        return None, {}
    try:
        text = file.read_text(encoding="utf-8")
        stored = json.loads(text)
        kind, files = stored["kind"], stored["files"]
        if text == _text(kind, files) and isinstance(kind, str):
            return kind, files
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return None, {}
