"""Write output folders completely or not at all, and replace only an earlier result of the same kind."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from ..errors import GlowQError, OutputError
from .files import read_json

__all__ = ["EXPORT_MANIFEST", "Kind", "check_output", "is_result_file", "write_directory"]

_RESULT_FILES = (
    "config.json",
    "generation_config.json",
    "glowq.safetensors",
    "model*.safetensors",
    "model.safetensors.index.json",
    "README.md",
    "budgets.png",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
)
_COMPARISON_FILES = ("compare.json", "table.md", "bytes.png", "heatmap.png")
_TIMING_FILES = ("bench.json", "table.md", "bench.png")
EXPORT_MANIFEST = "glowq_export.json"  # lists every other file of the export


class Kind(Enum):
    """What a result folder holds. A result replaces only an earlier result of the same kind."""

    MODEL = "model"
    COMPARISON = "comparison"
    EXPORT = "export"
    TIMING = "timing"


def write_directory(target: Path, write: Callable[[Path], None], *, kind: Kind = Kind.MODEL) -> None:
    """Let `write` fill a temporary folder next to `target`, then rename that folder to `target`.

    If anything fails, nothing is written.

    Args:
        target: final folder. It must not exist, or be empty, or hold only an earlier result of the same kind.
        write: fills the folder that is passed to it.
        kind: what the folder will hold.

    Raises:
        OutputError: `target` holds other files, its parent cannot be written, or the disk is full.
    """
    check_output(target, kind=kind)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            fresh = Path(scratch) / "new"
            fresh.mkdir()
            write(fresh)
            _move_into_place(fresh, target)
    except GlowQError:
        raise
    except Exception as error:
        full = _is_full(error)
        if not full and not isinstance(error, OSError):
            raise
        reason = "the disk is full" if full else str(error)
        raise OutputError(f"cannot write {target}: {reason}. Nothing was left behind.") from error


def _move_into_place(fresh: Path, target: Path) -> None:
    """Rename `fresh` to `target`; an earlier result is deleted afterwards, or restored if the renaming fails."""
    if not target.exists():
        fresh.rename(target)
        return
    # Not inside the temporary folder, which is always deleted.
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.earlier.", dir=target.parent))
    old = aside / target.name
    try:
        target.rename(old)
        fresh.rename(target)
    except BaseException as error:  # an interrupt may also come between the two renames
        if old.exists() and fresh.exists():
            try:
                old.rename(target)
            except OSError as again:
                raise OutputError(
                    f"cannot write {target}: {error}. It could not be put back either ({again}): the earlier result is "
                    f"whole in {old}; move it back to {target}."
                ) from error
        shutil.rmtree(aside)
        raise
    shutil.rmtree(aside)


def _is_full(error: Exception) -> bool:
    """Whether the disk is full; safetensors and tokenizers (both Rust) report this only in their message."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def check_output(target: Path, *, kind: Kind = Kind.MODEL) -> None:
    """Check, before hours of work, that `write_directory` will accept `target`.

    Raises:
        OutputError: see `write_directory`.
    """
    if target.is_file():
        raise OutputError(f"{target} is a file; expected a folder to write to.")
    if target.is_dir():
        names = {path.relative_to(target).as_posix(): path.is_dir() for path in _leaves(target)}
        own, is_earlier = _results(target, kind)
        foreign = [name for name, is_folder in names.items() if is_folder or not own(name)]
        if foreign or (names and not is_earlier):
            what = f"holds {foreign[0]!r}" if foreign else "holds no earlier result of glowq"
            raise OutputError(f"{target} is not empty and {what}; choose another folder, so that nothing is lost.")
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{parent} is not writable; choose another folder.")


def is_result_file(name: str) -> bool:
    """Whether a saved correction or corrected model may hold a file with this name at its top level."""
    return _is_named(name, _RESULT_FILES)


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)  # a * of fnmatch also matches a /


def _leaves(folder: Path) -> Iterator[Path]:
    """Yield everything that would be lost with `folder`: every file, every link and every empty folder in it."""
    for entry in sorted(folder.iterdir()):
        inner = [*_leaves(entry)] if entry.is_dir() and not entry.is_symlink() else []
        yield from inner or [entry]


def _results(folder: Path, kind: Kind) -> tuple[Callable[[str], bool], bool]:
    """Return a test of whether a relative path belongs to a result of this kind, and whether `folder` holds one."""
    if kind is Kind.COMPARISON:
        return partial(_is_named, patterns=_COMPARISON_FILES), (folder / "compare.json").is_file()
    if kind is Kind.TIMING:
        return partial(_is_named, patterns=_TIMING_FILES), (folder / "bench.json").is_file()
    if kind is Kind.EXPORT:
        manifest = folder / EXPORT_MANIFEST
        is_earlier = manifest.is_file()
        named = {EXPORT_MANIFEST, *(read_json(manifest).get("files", {}) if is_earlier else ())}
        return named.__contains__, is_earlier
    config = folder / "config.json"
    stored = read_json(config).get("quantization_config") if config.is_file() else None
    return is_result_file, isinstance(stored, dict) and stored.get("quant_method") == "glowq"
