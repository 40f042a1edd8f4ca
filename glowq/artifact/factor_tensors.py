"""The tensors of a correction's factors as its file stores them, and what config.json says about each group."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..factors.factors import GroupFactors
from ..factors.integers import Stored, pack

__all__ = ["describe_groups", "digest", "factor_tensors", "with_checksums"]


def factor_tensors(factors: Sequence[GroupFactors]) -> dict[str, Tensor]:
    """The tensors that the file stores, sorted by name; see `glowq.artifact.factor_layout.layout`."""
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
