"""Files in and out: whole directories or nothing, safetensors and JSON only, nothing outside a repository's folder."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import CorrectionError, GlowQError, ModelNotFoundError, OutputError, PickleRefusedError, UnsafePathError

__all__ = [
    "EXPORT_MANIFEST",
    "PICKLES",
    "Kind",
    "check_output",
    "checkpoint_files",
    "is_result_file",
    "local_snapshot",
    "read_json",
    "refuse_pickles",
    "safe_join",
    "write_directory",
]

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
EXPORT_MANIFEST = "glowq_export.json"  # names every file beside it
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class Kind(Enum):
    """What a folder of results holds; each replaces its own kind only."""

    MODEL = "model"
    COMPARISON = "comparison"
    EXPORT = "export"
    TIMING = "timing"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelNotFoundError: no such file.
        CorrectionError: the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path} does not exist; expected the folder of a saved model.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorrectionError(f"{path} is not valid JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise CorrectionError(f"{path} holds {type(value).__name__}, expected a JSON object.")
    return value


def safe_join(folder: Path, name: str) -> Path:
    """`folder/name`, refused where `name` points outside of `folder`.

    Raises:
        UnsafePathError: `name` is absolute or climbs out.
    """
    pure = PurePosixPath(name.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or ":" in name:
        raise UnsafePathError(f"{name!r} in {folder} points outside its repository; refused.")
    return folder / pure


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder that offers weights only as pickles.

    Raises:
        PickleRefusedError: weights in a format that can run code, and no safetensors.
    """
    _refuse_only_pickles(str(folder), [entry.name for entry in folder.iterdir()])


def _refuse_only_pickles(where: str, names: Iterable[str]) -> None:
    names = sorted(names)
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise PickleRefusedError(
            f"{where} offers its weights as {pickles[0]}, a pickle, which can run code when it is read. Convert it to "
            "safetensors (save_pretrained of a current transformers does)."
        )


def local_snapshot(name: str | os.PathLike[str], **hub_kwargs: Any) -> Path:
    """The local folder of a model: the folder itself, or the Hub repository's safetensors, JSON and tokenizer files.

    Args:
        name: folder or Hub name.
        **hub_kwargs: to `huggingface_hub.snapshot_download`, e.g. `revision`, `token`, `local_files_only`.

    Raises:
        ModelNotFoundError: neither a folder nor a repository of that name and revision, or the Hub may not be asked and
            the cache does not hold it.
        HubError: it is gated, the token is not valid, or the Hub cannot be reached.
        PickleRefusedError: it offers its weights only as pickles, which are not downloaded.
        OutputError: the disk is full.
    """
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import HfApi, constants, snapshot_download

    from .hub_errors import asking_hub

    patterns = [
        "*.json",
        "model*.safetensors",
        "glowq.safetensors",
        "adapter_model.safetensors",
        "*.model",
        "*.txt",
        "*.jinja",
    ]
    with asking_hub(os.fspath(name), hub_kwargs):
        folder = Path(snapshot_download(os.fspath(name), allow_patterns=patterns, **hub_kwargs))
        asked = not (constants.HF_HUB_OFFLINE or hub_kwargs.get("local_files_only"))
        if asked and not any(folder.glob("*.safetensors")):
            api = HfApi(token=hub_kwargs.get("token"))
            _refuse_only_pickles(os.fspath(name), api.list_repo_files(os.fspath(name), revision=folder.name))
    return folder


def checkpoint_files(folder: Path) -> list[str]:
    """The safetensors shards of a model folder, in the index's order.

    Raises:
        ModelNotFoundError: no safetensors weights, or a shard is missing.
        PickleRefusedError: weights only as pickles.
        UnsafePathError: the index names a file outside the folder.
    """
    refuse_pickles(folder)
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    files = [safe_join(folder, name) for name in names]
    for file in files:
        if not file.is_file():
            raise ModelNotFoundError(f"{file} is missing: the checkpoint in {folder} is incomplete.")
    return [str(file) for file in files]


def write_directory(target: Path, write: Callable[[Path], None], *, kind: Kind = Kind.MODEL) -> None:
    """Let `write` fill a temporary folder beside `target`, then rename it: all of it, or nothing.

    Args:
        target: final folder; must not exist, be empty, or hold an earlier result of glowq and nothing else.
        write: fills the folder it is given.
        kind: what it is filled with.

    Raises:
        OutputError: other files are in the way, the parent cannot be written, or the disk is full.
    """
    check_output(target, kind=kind)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            fresh, old = Path(scratch) / "new", Path(scratch) / "old"
            fresh.mkdir()
            write(fresh)
            if target.exists():
                target.rename(old)
            fresh.rename(target)
    except OSError as error:
        if isinstance(error, GlowQError):
            raise
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise OutputError(f"cannot write {target}: {reason}. Nothing was left behind.") from error


def check_output(target: Path, *, kind: Kind = Kind.MODEL) -> None:
    """Refuse early, before hours of work, what `write_directory` would refuse at the end.

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
    """Whether a correction or a corrected model, as glowq saves them, may hold a file of this name at its top level."""
    return _is_named(name, _RESULT_FILES)


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)  # whose * would match a /


def _leaves(folder: Path) -> Iterator[Path]:
    """What would be lost with `folder`: every file in it, every link, and every folder that holds nothing."""
    for entry in sorted(folder.iterdir()):
        inner = [*_leaves(entry)] if entry.is_dir() and not entry.is_symlink() else []
        yield from inner or [entry]


def _results(folder: Path, kind: Kind) -> tuple[Callable[[str], bool], bool]:
    """Tells the files that a result of this kind consists of, by their paths in it; and whether `folder` holds one."""
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
