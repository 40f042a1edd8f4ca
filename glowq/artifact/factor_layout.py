"""The names, shapes and dtypes of the tensors that store a group's factors, and the group as config.json has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..factors.form import BLOCK
from ..factors.group import Group

__all__ = ["FACTOR_KEYS", "ITEMSIZES", "bits_of_header", "layout", "stored_group"]

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


def stored_group(name: str, stored: Mapping[str, Any]) -> Group:
    """The group whose description in config.json is `stored`, an entry of `describe_groups`."""
    return Group(
        name=name,
        members=tuple(stored["members"]),
        in_features=int(stored["in_features"]),
        out_features=tuple(int(width) for width in stored["out_features"]),
        block=str(stored["block"]),
    )
