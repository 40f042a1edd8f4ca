"""`Correction`: what a calibration produced, as it is saved, loaded, cut and verified."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .backends import method_of
from .card import correction_card
from .config import GlowQConfig
from .errors import ConfigError, CorrectionError, ModelNotFoundError, NonFiniteError, RankError
from .files import read_json, refuse_pickles, write_directory
from .groups import Group
from .runtime import GroupFactors
from .selection import ranks_within

__all__ = ["FACTORS_FILE", "Correction", "describe_groups", "factor_tensors", "read_factors"]

FACTORS_FILE = "glowq.safetensors"


@dataclass(repr=False)
class Correction:
    """The factors of every restored group, and where they came from.

    Attributes:
        factors: one entry a restored group: in the order of the model's forward, or by name where read from files.
        config: what config.json stores about the correction: base quantizer, base model, groups, method, seed.
        model_config: the quantized model's own config.json fields, without its quantization.
        base_bytes: bytes of the quantized weights at their nominal bit width, the denominator of every budget.
        tokenizer: saved next to the factors, so that the folder works in a pipeline; or None.
        generation_config: saved next to the factors where the model has one; or None.
        base_is_stored: whether the base can be loaded again from where `config.base_model` says: False where it was
            quantized in memory with text that no config holds (GPTQ).
    """

    factors: list[GroupFactors]
    config: GlowQConfig
    model_config: dict[str, Any]
    base_bytes: int
    tokenizer: Any = None
    generation_config: Any = None
    base_is_stored: bool = True

    @property
    def ranks(self) -> dict[str, int]:
        """Group name -> rank."""
        return {entry.group.name: entry.rank for entry in self.factors}

    @property
    def factor_bytes(self) -> int:
        """Bytes that the correction adds to the model."""
        return sum(entry.factor_bytes for entry in self.factors)

    @property
    def overhead(self) -> float:
        """`factor_bytes` as a share of the quantized weights' bytes."""
        return self.factor_bytes / self.base_bytes

    def __repr__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "empty"
        return f"Correction({len(self.factors)} groups, {shown}, {self.factor_bytes} bytes, +{self.overhead:.2%})"

    def tensors(self) -> dict[str, Tensor]:
        """The tensors as a file holds them, on the CPU: `<group>.right` (r, d) and `<member>.left` (o, r)."""
        return factor_tensors(self.factors)

    def model_card(self) -> str:
        """Text of README.md: metadata, what was corrected, what was measured, how to load it."""
        return correction_card(self.config, self.factors, self.base_bytes)

    def cut(self, *, rank: int | None = None, budget: str | int | None = None) -> Correction:
        """The same correction at smaller ranks: the factors are nested, so that nothing is solved again.

        Args:
            rank: largest rank a group keeps.
            budget: share of the quantized weights' bytes ("1%") or bytes ("200MB", 4096) that the factors may take.

        Raises:
            RankError: rank below 1.
            ConfigError: the budget cannot be parsed, or does not pay for one rank of any group.
        """
        ranks = self.ranks
        if rank is not None:
            if rank < 1:
                raise RankError(f"rank must be at least 1, found {rank}.")
            ranks = {name: min(rank, largest) for name, largest in ranks.items()}
        if budget is not None:
            ranks = ranks_within(self.factors, ranks, budget, self.base_bytes)
        kept = [entry for entry in self.factors if entry.group.name in ranks]
        factors = [_cut_group(entry, ranks[entry.group.name]) for entry in kept]
        return replace(self, factors=factors, config=self.config.with_groups(describe_groups(factors)))

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write the small form: config.json, glowq.safetensors, tokenizer files, model card; all of it or nothing.

        The folder loads as a model with plain `from_pretrained` (after `import glowq`); its base is found by name.

        Args:
            save_directory: created if missing; an empty folder or an earlier correction of the same kind is accepted.
            push_to_hub: also upload the folder; `kwargs` go to `push_to_hub` (`repo_id` defaults to the folder's name).

        Raises:
            OutputError: the directory holds other files, cannot be written, or the disk is full.
            ConfigError: the base was quantized in memory and is stored nowhere.
        """
        if not self.base_is_stored:
            raise ConfigError(
                f"the base was quantized in memory with calibration text ({method_of(self.config.base)}) and is stored "
                "nowhere that a correction could name. Save the model in one piece (model.save_pretrained, or `glowq "
                "correct --format full`), or save the quantized model first and correct what you saved."
            )
        target = Path(save_directory)
        config = {**self.model_config, "transformers_weights": FACTORS_FILE}
        config["quantization_config"] = self.config.to_dict()

        def write(folder: Path) -> None:
            (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            (folder / FACTORS_FILE).write_bytes(save(self.tensors(), metadata={"format": "pt"}))
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            if self.generation_config is not None:
                # Not its own save_pretrained: that refuses the settings of many published models.
                (folder / "generation_config.json").write_text(self.generation_config.to_json_string())
            (folder / "README.md").write_text(self.model_card())

        write_directory(target, write)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", target.name), **kwargs)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **kwargs: Any
    ) -> str:
        """Upload the small form to the Hub and return the commit's address.

        Args:
            repo_id: "name" or "organization/name"; created if missing.
            private: visibility of a new repository.
            token: access token; None takes the one that `hf auth login` stored.
            **kwargs: to `HfApi.upload_folder`, e.g. `commit_message`, `revision`, `create_pr`.

        Raises:
            ConfigError: the base is a folder of this machine, which nobody else can load.
        """
        from huggingface_hub import HfApi

        base = str((self.config.base_model or {}).get("name", ""))
        if os.path.isabs(base):
            raise ConfigError(
                f"the base of this correction is the local folder {base!r}, which nobody else can load. Push the base "
                "first, then set correction.config.base_model['name'] to its Hub name and ['revision'] to its commit."
            )
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "correction")
            kwargs.setdefault("commit_message", "Upload glowq correction")
            return str(api.upload_folder(repo_id=repo, folder_path=Path(folder) / "correction", **kwargs))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **hub_kwargs: Any) -> Correction:
        """Read a saved correction; the model itself is not loaded.

        Args:
            path: a folder that `save_pretrained` wrote, or a Hub name.
            **hub_kwargs: to `huggingface_hub.snapshot_download`, e.g. `revision`, `token`, `local_files_only`.

        Raises:
            ModelNotFoundError: no such folder, or it holds no correction.
            CorrectionError: its files are corrupt, or a factor is missing, extra or misshaped.
        """
        from .files import local_snapshot

        folder = local_snapshot(path, **hub_kwargs)
        refuse_pickles(folder)
        model_config = read_json(folder / "config.json")
        stored = model_config.pop("quantization_config", None)
        if not isinstance(stored, dict) or stored.get("quant_method") != "glowq":
            raise ModelNotFoundError(f"{path}: its config.json names no glowq correction.")
        config = GlowQConfig.from_dict(stored)
        if config.format != "correction":
            raise ModelNotFoundError(
                f"{path} is a self-contained glowq model, not a correction: load it with from_pretrained."
            )
        model_config.pop("transformers_weights", None)
        factors = read_factors([folder / FACTORS_FILE], config.groups or {})
        tokenizer = generation = None
        if (folder / "tokenizer_config.json").is_file():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder)
        if (folder / "generation_config.json").is_file():
            from transformers import GenerationConfig

            generation = GenerationConfig.from_pretrained(folder)
        return cls(factors, config, model_config, int(config.base_bytes or 0), tokenizer, generation)


def factor_tensors(factors: Sequence[GroupFactors]) -> dict[str, Tensor]:
    """File tensors of the groups, sorted by name: `<group>.right` and `<member>.left`."""
    tensors: dict[str, Tensor] = {}
    for entry in factors:
        tensors[f"{entry.group.name}.right"] = entry.right
        tensors.update({f"{member}.left": left for member, left in entry.lefts.items()})
    return {name: tensors[name].detach().contiguous().cpu() for name in sorted(tensors)}


def describe_groups(factors: Sequence[GroupFactors]) -> dict[str, dict[str, Any]]:
    """What config.json says of each group."""
    return {
        entry.group.name: {
            "members": list(entry.group.members),
            "in_features": entry.group.in_features,
            "out_features": list(entry.group.out_features),
            "block": entry.group.block,
            "rank": entry.rank,
            "gains": [float(gain) for gain in entry.gains],
        }
        for entry in factors
    }


def read_factors(files: Sequence[Path], groups: Mapping[str, Mapping[str, Any]]) -> list[GroupFactors]:
    """Read and check the factors of `groups` from safetensors files; other tensors in them are left alone.

    Raises:
        CorrectionError: a file is corrupt or truncated, or a factor is missing, extra or misshaped.
        NonFiniteError: a factor holds NaN or Inf.
    """
    found = _factor_index(files)
    factors = []
    for name, stored in groups.items():
        group = Group(
            name=name,
            members=tuple(stored["members"]),
            in_features=int(stored["in_features"]),
            out_features=tuple(int(width) for width in stored["out_features"]),
            block=str(stored["block"]),
        )
        rank = int(stored["rank"])
        right = _take(found, f"{name}.right", (rank, group.in_features))
        lefts = {
            member: _take(found, f"{member}.left", (width, rank))
            for member, width in zip(group.members, group.out_features, strict=True)
        }
        factors.append(GroupFactors(group, right, lefts, torch.tensor(stored["gains"], dtype=torch.float64)))
    if found:
        raise CorrectionError(
            f"extra factor {sorted(found)[0]!r} ({len(found)} in all) that no group of config.json names; the file and "
            "its config.json do not belong together. Download or correct again."
        )
    return factors


def _factor_index(files: Sequence[Path]) -> dict[str, Path]:
    index: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise CorrectionError(f"{file} is missing; download the correction again.")
        try:
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
        except SafetensorError as error:
            raise CorrectionError(
                f"{file} is corrupt or truncated ({error}); download the correction again."
            ) from error
        index.update({name: file for name in names if name.endswith((".right", ".left"))})
    return index


def _take(index: dict[str, Path], name: str, shape: tuple[int, ...]) -> Tensor:
    file = index.pop(name, None)
    if file is None:
        raise CorrectionError(f"factor {name!r} is missing; the correction is incomplete. Download or correct again.")
    with safe_open(file, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise CorrectionError(
            f"factor {name!r} in {file} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, expected a float "
            f"tensor of shape {shape}."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(f"factor {name!r} in {file} holds NaN or Inf; download or correct again.")
    return tensor


def _cut_group(entry: GroupFactors, rank: int) -> GroupFactors:
    lefts = {member: left[:, :rank].contiguous() for member, left in entry.lefts.items()}
    return replace(entry, right=entry.right[:rank].contiguous(), lefts=lefts, gains=entry.gains[:rank])
