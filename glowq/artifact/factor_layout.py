"""How factors are stored: the names, shapes and dtypes of their tensors, and what config.json says about each group."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..factors.blocks import BLOCK
from ..factors.factors import GroupFactors
from ..factors.group import Group
from ..factors.integers import Stored, pack

__all__ = [
    "FACTOR_KEYS",
    "ITEMSIZES",
    "bits_of_header",
    "describe_groups",
    "digest",
    "factor_tensors",
    "layout",
    "stored_group",
    "with_checksums",
]

FACTOR_KEYS = r"\.(left|right|right_scale|(left|right)_multipliers)$"
"""Regular expression for the end of the name of each of a correction's tensors."""

_FLOATS = ("BF16", "F16", "F32", "F64")
ITEMSIZES: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
"""Bytes per value, for each dtype of a factor as safetensors names it."""


def layout(group: Group, rank: int, bits: int | None) -> dict[str, tuple[tuple[int, ...], Sequence[str]]]:
    """The tensors of a group's factors: name -> its shape, and the dtypes that it may have.

    Args:
        group: the group.
        rank: its rank.
        bits: see `GroupFactors`.
    """
    right = f"{group.name}.right"
    found: dict[str, tuple[tuple[int, ...], Sequence[str]]] = {}
    if bits is not None:
        found[f"{right}_scale"] = (rank,), ("F32",)
    if bits is None or bits == 8:
        dtypes = _FLOATS if bits is None else ("I8",)
        found[right] = (rank, group.in_features), dtypes
        found |= {f"{member}.left": ((width, rank), dtypes) for member, (width, _) in group.shapes.items()}
        return found
    blocks = -(-group.in_features // BLOCK)
    found[right] = (rank, blocks, 4 * bits), ("U8",)
    found[f"{right}_multipliers"] = (rank, blocks), ("I8",)
    for member, (width, _) in group.shapes.items():
        blocks = -(-width // BLOCK)
        found[f"{member}.left"] = (blocks, rank, 4 * bits), ("U8",)
        found[f"{member}.left_multipliers"] = (blocks, rank), ("I8",)
    return found


def bits_of_header(dtype: str, shape: Sequence[int]) -> int | None:
    """The bits per value of factors, by the dtype and shape of a right factor in a file; None for floats."""
    if dtype == "U8" and shape and shape[-1] in (12, 16):
        return int(shape[-1]) // 4
    return 8 if dtype == "I8" else None


def factor_tensors(factors: Sequence[GroupFactors]) -> dict[str, Tensor]:
    """The tensors that the file stores, sorted by name; see `layout`."""
    tensors: dict[str, Tensor | None] = {}
    for entry in factors:
        name = f"{entry.group.name}.right"
        right, lefts = Stored(entry.right), {member: Stored(left) for member, left in entry.lefts.items()}
        if entry.bits is not None:
            right, tensors[f"{name}_scale"], lefts = pack(entry.right, entry.lefts, entry.bits)
        stored = {name: right, **{f"{member}.left": left for member, left in lefts.items()}}
        for factor, (values, multipliers) in stored.items():
            tensors[factor], tensors[f"{factor}_multipliers"] = values, multipliers
    return {name: tensor.detach().contiguous().cpu() for name, tensor in sorted(tensors.items()) if tensor is not None}


def with_checksums(groups: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The groups as config.json stores them, with the SHA-256 of each factor, so that another one is refused.

    Args:
        groups: what `describe_groups` returned.
        tensors: what `factor_tensors` returned.
    """
    digests = {name: digest(tensor) for name, tensor in tensors.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, group in groups.items():
        names = [f"{name}.right", f"{name}.right_scale", f"{name}.right_multipliers"]
        names += [f"{member}.{kind}" for member in group["members"] for kind in ("left", "left_multipliers")]
        found[name] = {**group, "sha256": {part: digests[part] for part in names if part in digests}}
    return found


def digest(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's values."""
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
