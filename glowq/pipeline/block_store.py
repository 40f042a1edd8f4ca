"""Finished blocks of a correction on disk, so that an interrupted run can continue where it stopped.

Each block is one safetensors file. Its metadata holds the key of the run that solved it and the checksums of its
factors, with a digest of both. So a block of another run, or a damaged one, is never taken for a finished one: it is
solved again. A comparison keeps its finished cells in the same way, see `glowq.pipeline.compare.cells`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from .._version import __version__
from ..artifact.config import GlowQConfig
from ..artifact.factor_files import read_factors
from ..artifact.factor_tensors import describe_groups, factor_tensors, with_checksums
from ..data.inputs import Inputs, Samples
from ..errors import OutputError
from ..factors.factors import GroupFactors
from ..factors.group import Group
from ..utils.output import reason_of
from ..utils.scratch import NEW, scratch_folder, try_lock, unlock

__all__ = ["Block", "BlockFolder", "Resume", "check_blocks", "open_blocks", "remove_blocks", "run_key"]

_BLOCK = re.compile(r"[0-9a-f]{16}\.safetensors")
_LOCK = "glowq.lock"
_ABOUT = "glowq_block"  # key of a file's metadata: a digest, and the description of the block in JSON

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Block:
    """A finished block.

    Attributes:
        factors: its factors.
        value: what else is stored of it, as JSON has it.
    """

    factors: list[GroupFactors]
    value: Any


class BlockFolder:
    """A folder of finished blocks, which one run holds at a time; see `open_blocks`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, block: str, key: str) -> Block | None:
        """A block that the run `key` finished; None if there is none, or if the file is damaged."""
        file = self._file(block)
        if not file.is_file():
            return None
        try:
            stored, factors = _read(file)
            is_asked = (stored["key"], stored["block"]) == (key, block)
            found = Block(factors, stored["value"])
        except Exception as error:  # whatever is wrong with the file, the block can be solved again
            _logger.warning("%s is damaged (%s): block %r is solved again.", file, " ".join(str(error).split()), block)
            return None
        return found if is_asked else None

    def write(self, block: str, key: str, factors: Sequence[GroupFactors] = (), value: Any = None) -> None:
        """Store a finished block, completely or not at all.

        Args:
            block: name of the block.
            key: what `run_key` returned.
            factors: its factors.
            value: what else to store of it; JSON must be able to hold it.

        Raises:
            OutputError: the disk is full, or the file cannot be written.
        """
        tensors = factor_tensors(factors)
        groups = with_checksums(describe_groups(factors), tensors)
        about = json.dumps({"block": block, "key": key, "groups": groups, "value": value}, allow_nan=False)
        content = save(tensors, metadata={_ABOUT: f"{_digest(about)} {about}"})
        file = self._file(block)
        try:
            with scratch_folder(self.path) as scratch:
                (scratch / NEW / file.name).write_bytes(content)
                (scratch / NEW / file.name).replace(file)
        except OSError as error:
            raise OutputError(
                f"cannot write a finished block to {self.path}: {reason_of(error)}. The earlier blocks are kept: run "
                "the same command again when this is mended."
            ) from error

    def remove(self) -> None:
        """Remove every undamaged block of glowq, of whatever run. Other files stay."""
        for file in sorted(self.path.iterdir()):
            if _BLOCK.fullmatch(file.name) and file.is_file() and not file.is_symlink():
                with suppress(Exception):  # not a block of glowq
                    _read(file)
                    file.unlink()

    def _file(self, block: str) -> Path:
        return self.path / f"{hashlib.sha256(block.encode()).hexdigest()[:16]}.safetensors"


class Resume:
    """The blocks of one run in a folder.

    Args:
        folder: where blocks are stored; None stores nothing.
        key: what `run_key` returned.
        prefix: first part of the names of the blocks, where several corrections share a folder.
    """

    def __init__(self, folder: BlockFolder | None = None, key: str = "", prefix: str = "") -> None:
        self.folder = folder
        self.key = key
        self.prefix = prefix

    def load(self, block: str, groups: Sequence[Group]) -> list[GroupFactors] | None:
        """The factors of a finished block, or None if the block must be solved."""
        found = None if self.folder is None else self.folder.read(self.prefix + block, self.key)
        if found is None:
            return None
        members = {member for group in groups for member in group.members}
        same = {member for entry in found.factors for member in entry.group.members} == members
        return found.factors if same else None

    def save(self, block: str, factors: Sequence[GroupFactors]) -> None:
        """Store a finished block."""
        if self.folder is not None:
            self.folder.write(self.prefix + block, self.key, factors)


@contextmanager
def open_blocks(path: str | os.PathLike[str]) -> Iterator[BlockFolder]:
    """Create a folder of blocks if it is missing, and hold it. At the end it stays, unless it holds no block.

    Raises:
        OutputError: another run holds the folder, it holds something other than blocks, or it cannot be written.
    """
    folder = Path(path).resolve()
    with _held(folder) as is_free:
        if not is_free:
            raise OutputError(
                f"another run keeps its finished blocks in {folder}; wait until it ends, or choose another OUT."
            )
        for entry in sorted(folder.iterdir()):
            if entry.name != _LOCK and not _BLOCK.fullmatch(entry.name):
                raise OutputError(
                    f"{folder} holds {entry.name!r}, which is no finished block of this version of glowq; move it, "
                    "remove the folder yourself if you do not need it, or choose another OUT."
                )
        yield BlockFolder(folder)


def check_blocks(path: Path) -> None:
    """Check, before the model is loaded, that `open_blocks` will accept the folder.

    Raises:
        OutputError: see `open_blocks`.
    """
    with open_blocks(path):
        pass


def remove_blocks(path: Path) -> None:
    """Remove the undamaged blocks of a folder, and the folder if it then is empty; nothing if another run holds it."""
    with _held(path) as is_free:
        if not is_free:
            return
        BlockFolder(path).remove()
        left = [entry.name for entry in path.iterdir() if entry.name != _LOCK]
        if left:
            _logger.warning("%s stays: it holds %r, which is no undamaged block of glowq.", path, left[0])


def run_key(
    config: GlowQConfig, reference: str, ranks: Mapping[str, int], dtype: torch.dtype, sequences: Samples
) -> str:
    """A digest of everything that the factors of a run depend on. Runs with the same key can continue each other.

    Args:
        config: base, method and seed.
        reference: what `Reference.identity` returned.
        ranks: group name -> rank to solve.
        dtype: dtype of the factors.
        sequences: token ids that the blocks are calibrated on, int64, shape (n, length), or samples of another kind.
    """
    settings = [__version__, config.to_dict(), reference, dict(ranks), str(dtype), list(sequences.shape)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    samples = sequences.samples if isinstance(sequences, Inputs) else ({"": sequences},)
    for name, value in (item for sample in samples for item in sorted(sample.items())):
        if name:
            digest.update(f"|{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder, created if it is missing; False if another run holds it. An empty folder is removed at the end."""
    try:
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = try_lock(folder / _LOCK)
                break
            except FileNotFoundError:  # a run that ended has just removed the folder
                continue
    except OSError as error:
        raise OutputError(f"cannot write finished blocks to {folder}: {reason_of(error)}.") from error
    try:
        yield lock is not None
    finally:
        if lock is not None:
            unlock(lock)
            with suppress(OSError):  # it holds blocks
                folder.rmdir()


def _read(file: Path) -> tuple[dict[str, Any], list[GroupFactors]]:
    """The description and the factors of a block. Raises an error of any kind if the file is not as it was written."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    if _ABOUT not in metadata:
        raise ValueError("it is no block of this version of glowq")
    digest, _, about = metadata[_ABOUT].partition(" ")
    if digest != _digest(about):
        raise ValueError("its digest is another one")
    stored: dict[str, Any] = json.loads(about)
    return stored, read_factors([file], stored["groups"])  # compares the checksum of each factor


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
