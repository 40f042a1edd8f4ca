"""Changes of saved corrections on disk, and random factors of two groups."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from glowq.factors.factors import GroupFactors
from glowq.factors.group import Group


def changed(whole: Path, copy: Path, change: Any) -> Path:
    """Copy a saved correction and change its stored quantization config."""
    shutil.copytree(whole, copy)
    config = json.loads((copy / "config.json").read_text())
    change(config["quantization_config"])
    (copy / "config.json").write_text(json.dumps(config))
    return copy


GROUPS = [Group("q", ("q", "k"), 8, (6, 4), "block"), Group("o", ("o",), 6, (8,), "block")]


def factors_of(seed: int) -> list[GroupFactors]:
    """Random factors of rank 2 of `GROUPS`, in bfloat16."""
    drawn = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=drawn).to(torch.bfloat16)

    return [
        GroupFactors(
            group,
            values(2, group.in_features),
            {name: values(width, 2) for name, width in zip(group.members, group.out_features, strict=True)},
            torch.rand(2, generator=drawn, dtype=torch.float64),
            1.5,
        )
        for group in GROUPS
    ]
