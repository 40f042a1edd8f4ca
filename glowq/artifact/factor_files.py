"""Factors in safetensors files. Opening the files checks all headers; only the requested ranks are read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CorrectionError, NonFiniteError
from ..factors.factors import GroupFactors
from ..factors.group import Group
from ..factors.int8 import SCALE_BYTES, Packed, pack, unpack
from ..selection.allocation import GroupGains
from ..utils.files import check_regular

__all__ = [
    "FACTOR_KEYS",
    "StoredFactors",
    "describe_groups",
    "factor_tensors",
    "open_factors",
    "read_factors",
    "stored_group",
    "with_checksums",
]

FACTOR_KEYS = r"\.(left|right|right_scale)$"
"""Regular expression for the end of the name of each of a correction's tensors."""

_ITEMSIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1}  # bytes per value, for each dtype of a factor
_UNPACKED = torch.bfloat16  # dtype of int8 factors in memory until they are attached; it holds their values exactly


def factor_tensors(factors: Sequence[GroupFactors]) -> dict[str, Tensor]:
    """The tensors that the file stores, sorted by name.

    They are `<group>.right` and `<member>.left`, and for int8 factors also `<group>.right_scale`.
    """
    tensors: dict[str, Tensor] = {}
    for entry in factors:
        right, lefts = entry.right, entry.lefts
        if entry.int8:
            right, tensors[f"{entry.group.name}.right_scale"], lefts = pack(right, lefts)
        tensors[f"{entry.group.name}.right"] = right
        tensors.update({f"{member}.left": left for member, left in lefts.items()})
    return {name: tensors[name].detach().contiguous().cpu() for name in sorted(tensors)}


def with_checksums(groups: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The groups as config.json stores them, with the SHA-256 of each factor, so that another one is refused.

    Args:
        groups: what `describe_groups` returned.
        tensors: what `factor_tensors` returned.
    """
    digests = {name: _digest(tensor) for name, tensor in tensors.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, group in groups.items():
        names = [f"{name}.right", f"{name}.right_scale", *(f"{member}.left" for member in group["members"])]
        found[name] = {**group, "sha256": {part: digests[part] for part in names if part in digests}}
    return found


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def describe_groups(factors: Sequence[GroupFactors]) -> dict[str, dict[str, Any]]:
    """The description of each group that config.json stores."""
    return {
        entry.group.name: {
            "members": list(entry.group.members),
            "in_features": entry.group.in_features,
            "out_features": list(entry.group.out_features),
            "block": entry.group.block,
            "rank": entry.rank,
            "gains": [float(gain) for gain in entry.gains],
            "total": entry.total,
        }
        for entry in factors
    }


def stored_group(name: str, stored: Mapping[str, Any]) -> Group:
    """The group whose description in config.json is `stored`, an entry of `describe_groups`."""
    return Group(
        name=name,
        members=tuple(stored["members"]),
        in_features=int(stored["in_features"]),
        out_features=tuple(int(width) for width in stored["out_features"]),
        block=str(stored["block"]),
    )


@dataclass(frozen=True)
class StoredFactors:
    """The factors of a correction's groups in open files. Their values are read later.

    Attributes:
        group_gains: one entry per group, with one gain per stored rank.
        totals: group name -> error without a correction.
        tensors: factor name -> the open file that holds it, and the file's path.
        checksums: factor name -> SHA-256 of its values; empty for files of glowq 0.1, which are not checked.
    """

    group_gains: list[GroupGains]
    totals: Mapping[str, float]
    tensors: Mapping[str, tuple[Any, Path]]
    checksums: Mapping[str, str] = field(default_factory=dict)

    @property
    def factor_bytes(self) -> int:
        """Bytes of all factors."""
        return sum(len(item.gains) * item.rank_bytes for item in self.group_gains)

    def read(self, ranks: Mapping[str, int] | None = None) -> list[GroupFactors]:
        """Read only the first ranks of the given groups.

        Args:
            ranks: group name -> rank, from 1 to the stored rank; groups that are not named are left out. None reads
                everything.

        Raises:
            NonFiniteError: a factor that was read holds NaN or Inf.
            CorrectionError: a factor that was read as a whole is not what was saved, or a scale of int8 factors is no
                power of two.
        """
        factors = []
        for item in self.group_gains:
            group, held = item.group, len(item.gains)
            rank = held if ranks is None else ranks.get(group.name, 0)
            if rank == 0:
                continue
            every, first = slice(None), slice(None if rank == held else rank)
            right = self._take(f"{group.name}.right", (first, every))
            lefts = {member: self._take(f"{member}.left", (every, first)) for member in group.members}
            gains = torch.tensor(item.gains[:rank], dtype=torch.float64)
            int8 = right.dtype == torch.int8
            if int8:
                scale = self._take(f"{group.name}.right_scale", (first,))
                self._check_scale(group, scale)
                right, lefts = unpack(Packed(right, scale, lefts), _UNPACKED)
            factors.append(GroupFactors(group, right, lefts, gains, self.totals[group.name], int8))
        return factors

    def _check_scale(self, group: Group, scale: Tensor) -> None:
        mantissa, exponent = torch.frexp(scale)
        if not bool(((mantissa == 0.5) & (exponent > -126)).all()):
            _, file = self.tensors[f"{group.name}.right_scale"]
            raise CorrectionError(
                f"factor '{group.name}.right_scale' in {file} holds a scale that is no power of two, which glowq never "
                "writes: the file is damaged. Download or correct again."
            )

    def _check_digest(self, name: str, tensor: Tensor, file: Path) -> None:
        if self.checksums and self.checksums.get(name) != _digest(tensor):
            raise CorrectionError(
                f"factor {name!r} in {file} is not what was saved: its checksum differs. The file is damaged or was "
                "changed. Download or correct again."
            )

    def _take(self, name: str, part: tuple[slice, ...]) -> Tensor:
        opened, file = self.tensors[name]
        whole = part == (slice(None),) * len(part)
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
    """Open and check the factors of `groups` in safetensors files. Other tensors in the files are ignored.

    Args:
        files: files that together hold every factor of `groups`, and no factor of another group.
        groups: group name -> description, as config.json stores them.

    Raises:
        CorrectionError: a file is corrupt or truncated, or a factor is missing, extra or misshaped.
        ReadError: a file is no regular file.
    """
    with ExitStack() as stack:
        tensors = _open(files, stack)
        unmatched = dict(tensors)
        group_gains = [_checked_gains(stored_group(name, stored), stored, unmatched) for name, stored in groups.items()]
        extra = sorted(unmatched)
        if extra:
            raise CorrectionError(
                f"extra factor {extra[0]!r} ({len(extra)} in all) that no group of config.json names; the file and "
                "its config.json do not belong together. Download or correct again."
            )
        totals = {name: float(stored["total"]) for name, stored in groups.items()}
        digests = {name: digest for stored in groups.values() for name, digest in stored.get("sha256", {}).items()}
        yield StoredFactors(group_gains, totals, tensors, digests)


def read_factors(files: Sequence[Path], groups: Mapping[str, Mapping[str, Any]]) -> list[GroupFactors]:
    """Read and check all factors of `groups` from safetensors files; see `open_factors`.

    Raises:
        CorrectionError: a file is corrupt or truncated, or a factor is missing, extra or misshaped.
        NonFiniteError: a factor holds NaN or Inf.
    """
    with open_factors(files, groups) as stored:
        return stored.read()


def _open(files: Sequence[Path], stack: ExitStack) -> dict[str, tuple[Any, Path]]:
    tensors: dict[str, tuple[Any, Path]] = {}
    for file in files:
        if check_regular(file) is None:
            raise CorrectionError(f"{file} is missing; download the correction again.")
        try:
            opened = stack.enter_context(safe_open(file, framework="pt"))
        except SafetensorError as error:
            raise CorrectionError(
                f"{file} is corrupt or truncated ({error}); download the correction again."
            ) from error
        names = opened.keys()
        tensors.update({name: (opened, file) for name in names if re.search(FACTOR_KEYS, name)})
    return tensors


def _checked_gains(group: Group, stored: Mapping[str, Any], unmatched: dict[str, tuple[Any, Path]]) -> GroupGains:
    """Check that a group's factors in the headers fit its description, and return its gains.

    The group's factors are removed from `unmatched`.
    """
    rank = int(stored["rank"])
    shapes = {f"{group.name}.right": (rank, group.in_features)}
    shapes |= {f"{member}.left": (width, rank) for member, width in zip(group.members, group.out_features, strict=True)}
    dtypes = [_dtype(unmatched, name, shape) for name, shape in shapes.items()]
    rank_bytes = sum(
        prod(shape) // rank * _ITEMSIZES[dtype] for shape, dtype in zip(shapes.values(), dtypes, strict=True)
    )
    if "I8" in dtypes:
        scale = f"{group.name}.right_scale"
        if set(dtypes) != {"I8"} or _dtype(unmatched, scale, (rank,)) != "F32":
            raise CorrectionError(
                f"group {group.name!r} mixes int8 factors with others ({', '.join(dtypes)}), or its {scale!r} is not "
                "float32. Download or correct again."
            )
        rank_bytes += SCALE_BYTES
    return GroupGains(group, rank_bytes, [float(gain) for gain in stored["gains"]])


def _dtype(unmatched: dict[str, tuple[Any, Path]], name: str, shape: tuple[int, ...]) -> str:
    opened, file = unmatched.pop(name, (None, None))
    if opened is None:
        raise CorrectionError(f"factor {name!r} is missing; the correction is incomplete. Download or correct again.")
    header = opened.get_slice(name)
    found, dtype = tuple(header.get_shape()), str(header.get_dtype())
    if found != shape or dtype not in _ITEMSIZES:
        raise CorrectionError(
            f"factor {name!r} in {file} has shape {found} and dtype {dtype}, expected a float or int8 tensor of shape "
            f"{shape}."
        )
    return dtype
