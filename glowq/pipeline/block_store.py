"""`Resume`: stores the finished blocks of a correction on disk, so that an interrupted run can continue."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..artifact.config import GlowQConfig
from ..artifact.factor_files import describe_groups, factor_tensors, read_factors
from ..factors.factors import GroupFactors
from ..factors.group import Group
from ..utils.files import read_json

__all__ = ["Resume"]


class Resume:
    """A folder with two files per finished block. Blocks that were solved with other settings are ignored.

    Args:
        folder: folder of the files; None stores nothing.
        key: digest of everything that the factors depend on.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self.folder = folder
        self.key = key

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str] | None,
        config: GlowQConfig,
        reference: Any,
        ranks: Mapping[str, int],
        sequences: Tensor,
    ) -> Resume:
        """Open the store of one run.

        Runs with the same base, reference, ranks, method, seed and calibration tokens have the same key, and can
        continue each other.
        """
        if folder is None:
            return cls(None, "")
        name = getattr(reference, "name_or_path", reference)
        settings = json.dumps([config.to_dict(), name, dict(ranks)], sort_keys=True, default=str)
        digest = hashlib.sha256(settings.encode() + sequences.cpu().contiguous().numpy().tobytes())
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        return cls(path, digest.hexdigest())

    def load(self, block: str, groups: Sequence[Group]) -> list[GroupFactors] | None:
        """The factors of a finished block, or None if the block must be solved."""
        if self.folder is None or not self._index(block).is_file():
            return None
        index: dict[str, Any] = read_json(self._index(block))
        if index.get("key") != self.key:
            return None
        return read_factors([self._index(block).with_suffix(".safetensors")], index["groups"])

    def save(self, block: str, factors: Sequence[GroupFactors]) -> None:
        """Store a finished block. The index is written last, so that an incomplete block is never loaded."""
        if self.folder is None:
            return
        index = self._index(block)
        index.with_suffix(".safetensors").write_bytes(save(factor_tensors(factors)))
        scratch = index.with_suffix(".tmp")
        scratch.write_text(json.dumps({"key": self.key, "groups": describe_groups(factors)}))
        scratch.replace(index)

    def _index(self, block: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(block.encode()).hexdigest()[:16]}.json"
