"""A cache, between test runs, of models that take long to quantize.

The name of its folder is a hash of everything that could change the files of the libraries: the code that calls them,
the model, the calibration text, their versions, and the instruction set of the processor.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

ROOT = Path(__file__).parents[2]
STORE = "GLOWQ_TEST_MODELS"  # environment variable with the folder that the processes of a test run share
DAY = 24 * 60 * 60  # seconds


def open_store(parent: Path, model: Path, texts: list[str]) -> None:
    """Let this process and its children keep models below `parent`, and remove folders that no run used for a day.

    A folder that was used within a day may belong to a test run that has not ended.

    Args:
        parent: folder of the cache.
        model: folder of the model that is quantized.
        texts: texts on which the libraries calibrate.
    """
    folder = parent / _key(model, texts)
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    for other in parent.iterdir():
        if other.stat().st_mtime < time.time() - DAY:
            shutil.rmtree(other, ignore_errors=True)  # another run may remove it at the same time
    os.environ[STORE] = str(folder)


def once(name: str, fill: Callable[[Path], Any]) -> Path:
    """Return the folder of this name in the store. The first process that asks for it fills it; nothing changes it."""
    folder = _store() / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            made = _store() / f"{name}.part"
            shutil.rmtree(made, ignore_errors=True)  # from a run that ended before it was complete
            made.mkdir()
            fill(made)
            made.rename(folder)
    return folder


def written(write: Callable[..., Any], source: Path, **settings: Any) -> Path:
    """Return the folder to which a function of `writers` saved a model with these settings. Nothing changes it."""
    name = f"{write.__name__}-{_hash(iter((digest(source).encode(), repr(sorted(settings.items())).encode())))}"
    return once(name, lambda folder: write(source, folder, **settings))


@cache
def digest(folder: Path) -> str:
    """Return a hash of the names and contents of all files in a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return _hash(part for file in files for part in (str(file.relative_to(folder)).encode(), file.read_bytes()))


@cache
def _store() -> Path:
    """Return the folder that the test run shares, or a temporary folder of this process."""
    if STORE in os.environ:
        return Path(os.environ[STORE])
    folder = Path(tempfile.mkdtemp(prefix="glowq-bases-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _key(model: Path, texts: list[str]) -> str:
    return _hash(_what_changes_a_checkpoint(model, texts))


def _what_changes_a_checkpoint(model: Path, texts: list[str]) -> Iterator[bytes]:
    constraints = ROOT / "constraints.txt"
    for file in (*(Path(__file__).with_name(name) for name in ("bases.py", "store.py", "writers.py")), constraints):
        yield file.read_bytes()
    yield digest(model).encode()
    yield from (text.encode() for text in texts)
    yield f"{platform.python_version()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}".encode()
    pinned = {line.partition("==")[0] for line in constraints.read_text().splitlines() if "==" in line}
    for name in sorted(pinned | {"tokenizers"}):
        yield f"{name} {_version(name)}".encode()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _hash(parts: Iterator[bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()[:16]
