"""Where models that take long to quantize are kept between the runs of the tests.

A folder for everything that could change what the libraries write: the code that calls them, what they quantize and
calibrate on, their versions, and what the processor can do.
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
STORE = "GLOWQ_TEST_MODELS"  # names the folder that the processes of a test run share
DAY = 24 * 60 * 60  # seconds


def open_store(parent: Path, model: Path, texts: list[str]) -> None:
    """Let this process and its children keep models below `parent`, and remove what no run used for a day.

    Less than a day old may be of a run that is still under way, with the files as they were when it started.

    Args:
        model: the folder of the model that is quantized.
        texts: what the libraries calibrate on.
    """
    folder = parent / _key(model, texts)
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    for other in parent.iterdir():
        if other.stat().st_mtime < time.time() - DAY:
            shutil.rmtree(other, ignore_errors=True)  # another run may remove it too
    os.environ[STORE] = str(folder)


def once(name: str, fill: Callable[[Path], Any]) -> Path:
    """The folder of this name in the store, filled by the first process that asks for it; never written to again."""
    folder = _store() / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            made = _store() / f"{name}.part"
            shutil.rmtree(made, ignore_errors=True)  # of a run that was ended while it wrote
            made.mkdir()
            fill(made)
            made.rename(folder)
    return folder


def written(write: Callable[..., Any], source: Path, **settings: Any) -> Path:
    """The folder that a function of `writers` saved a model to, with these settings; never written to again."""
    name = f"{write.__name__}-{_hash(iter((digest(source).encode(), repr(sorted(settings.items())).encode())))}"
    return once(name, lambda folder: write(source, folder, **settings))


@cache
def digest(folder: Path) -> str:
    """A hash of the names and the contents of all files of a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return _hash(part for file in files for part in (str(file.relative_to(folder)).encode(), file.read_bytes()))


@cache
def _store() -> Path:
    """The folder of the test run, or one of this process."""
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
