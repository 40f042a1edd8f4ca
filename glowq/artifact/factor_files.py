"""Factors in safetensors files. Opening the files checks all headers; only the requested ranks are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CorrectionError, NonFiniteError
from ..factors.blocks import fits_numbers
from ..factors.factors import GroupFactors
from ..factors.group import Group
from ..factors.integers import Packed, Stored, unpack
from ..selection.allocation import GroupGains
from .factor_headers import read_factor_headers
from .factor_tensors import digest

__all__ = ["StoredFactors", "open_factors", "read_factors"]

_UNPACKED = torch.bfloat16  # dtype of rounded factors in memory until they are attached; it holds their values exactly


@dataclass(frozen=True)
class StoredFactors:
    """The factors of a correction's groups in open files. Their values are read later.

    Attributes:
        group_gains: one entry per group, with one gain per stored rank.
        bits: group name -> bits per value of its factors; None for floats.
        totals: group name -> error without a correction.
        tensors: tensor name -> the open file that holds it, and the file's path.
        checksums: factor name -> SHA-256 of its values; empty for files of glowq 0.1, which are not checked.
    """

    group_gains: list[GroupGains]
    bits: Mapping[str, int | None]
    totals: Mapping[str, float]
    tensors: Mapping[str, tuple[Any, Path]]
    checksums: Mapping[str, str] = field(default_factory=dict)

    def read(self, ranks: Mapping[str, int] | None = None) -> list[GroupFactors]:
        """Read only the first ranks of the given groups.

        Args:
            ranks: group name -> rank, from 1 to the stored rank; groups that are not named are left out. None reads
                everything.

        Raises:
            NonFiniteError: a factor that was read holds NaN or Inf.
            CorrectionError: a factor that was read as a whole is not what was saved, or a scale or a multiplier of
                rounded factors is none that glowq writes.
        """
        factors = []
        for item in self.group_gains:
            group, held = item.group, len(item.gains)
            rank = held if ranks is None else ranks.get(group.name, 0)
            if rank == 0:
                continue
            first = slice(None if rank == held else rank)
            right = self._take_factor(f"{group.name}.right", 0, first)
            lefts = {member: self._take_factor(f"{member}.left", 1, first) for member in group.members}
            bits = self.bits[group.name]
            if bits is None:
                floats = right.values, {member: left.values for member, left in lefts.items()}
            else:
                scale = self._take(f"{group.name}.right_scale", (first,))
                self._check_scale(group, scale)
                floats = unpack(Packed(right, scale, lefts), _UNPACKED, group.shapes)
            gains = torch.tensor(item.gains[:rank], dtype=torch.float64)
            factors.append(GroupFactors(group, *floats, gains, self.totals[group.name], bits))
        return factors

    def _take_factor(self, name: str, dimension: int, first: slice) -> Stored:
        """Read the first ranks of a factor, which are along `dimension`, and the multipliers of its blocks."""
        several = f"{name}_multipliers"
        part = (*[slice(None)] * dimension, first)
        values = self._take(name, part)
        if several not in self.tensors:
            return Stored(values)
        multipliers = self._take(several, part)
        if not fits_numbers(values, multipliers):
            raise CorrectionError(
                f"factor {name!r} in {self.tensors[name][1]} holds numbers above 127, which glowq never writes: the "
                "file is damaged. Download or correct again."
            )
        return Stored(values, multipliers)

    def _check_scale(self, group: Group, scale: Tensor) -> None:
        mantissa, exponent = torch.frexp(scale)
        if not bool(((mantissa == 0.5) & (exponent > -126)).all()):
            _, file = self.tensors[f"{group.name}.right_scale"]
            raise CorrectionError(
                f"factor '{group.name}.right_scale' in {file} holds a scale that is no power of two, which glowq never "
                "writes: the file is damaged. Download or correct again."
            )

    def _check_digest(self, name: str, tensor: Tensor, file: Path) -> None:
        if self.checksums and self.checksums.get(name) != digest(tensor):
            raise CorrectionError(
                f"factor {name!r} in {file} is not what was saved: its checksum differs. The file is damaged or was "
                "changed. Download or correct again."
            )

    def _take(self, name: str, part: tuple[slice, ...]) -> Tensor:
        opened, file = self.tensors[name]
        whole = part == (slice(None),) * len(part)
        part += (slice(None),) * (len(opened.get_slice(name).get_shape()) - len(part))
        if whole:
            tensor: Tensor = opened.get_tensor(name)
        else:
            # Copy the slice: it is a view of the memory-mapped file, and would keep the file mapped.
            tensor = opened.get_slice(name)[part].clone(memory_format=torch.contiguous_format)
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"factor {name!r} in {file} holds NaN or Inf; download or correct again.")
        if whole:
            self._check_digest(name, tensor, file)
        return tensor


@contextmanager
def open_factors(files: Sequence[Path], groups: Mapping[str, Mapping[str, Any]]) -> Iterator[StoredFactors]:
    """Check the headers of factors, see `read_factor_headers`, and open their files."""
    headers = read_factor_headers(files, groups)
    totals = {name: float(stored["total"]) for name, stored in groups.items()}
    digests = {name: digest for stored in groups.values() for name, digest in stored.get("sha256", {}).items()}
    with ExitStack() as stack:
        opened = [(stack.enter_context(safe_open(file, framework="pt")), file) for file in files]
        tensors = {name: (handle, file) for handle, file in opened for name in handle.keys()}  # noqa: SIM118 - no dict
        yield StoredFactors(headers.group_gains, headers.bits, totals, tensors, digests)


def read_factors(
    files: Sequence[Path], groups: Mapping[str, Mapping[str, Any]], ranks: Mapping[str, int] | None = None
) -> list[GroupFactors]:
    """Read and check factors of `groups` from safetensors files; see `open_factors` and `StoredFactors.read`.

    Raises:
        CorrectionError: a file is corrupt or truncated, or a factor is missing, extra or misshaped.
        NonFiniteError: a factor holds NaN or Inf.
    """
    with open_factors(files, groups) as stored:
        return stored.read(ranks)
