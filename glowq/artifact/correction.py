"""`Correction`: what a calibration produced, as it is saved, loaded, cut and verified."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..errors import ConfigError
from ..factors.factors import GroupFactors, cut_group
from ..factors.rounding import rounded
from ..quantizers.registry import method_of
from ..selection.allocation import GroupGains
from ..selection.budget import RankRequest
from ..selection.ranks import check_measured, choose_ranks
from ..selection.rounding import check_rounding, stored_as
from ..utils.output import write_directory
from .card import CARD, base_license, card_files
from .config import GlowQConfig
from .factor_files import describe_groups, factor_tensors
from .provenance import Selected
from .saved import FACTORS_FILE, SavedCorrection, open_saved

__all__ = ["Correction"]


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

    @property
    def predicted(self) -> float | None:
        """Share of the whole model's predicted loss that the factors remove; None where none was measured."""
        total = self.config.total
        return math.fsum(chain.from_iterable(entry.gains.tolist() for entry in self.factors)) / total if total else None

    def __repr__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "empty"
        kind = " of int8" if self.factors and all(entry.int8 for entry in self.factors) else ""
        return f"Correction({len(self.factors)} groups, {shown}, {self.factor_bytes} bytes{kind}, +{self.overhead:.2%})"

    @property
    def group_gains(self) -> list[GroupGains]:
        """What the ranks of each group gain and take, which a budget is allocated by."""
        return [
            GroupGains(entry.group, entry.factor_bytes // entry.rank, entry.gains.tolist()) for entry in self.factors
        ]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors as a file holds them, on the CPU: `<group>.right` (r, d) and `<member>.left` (o, r)."""
        return factor_tensors(self.factors)

    def model_card(self) -> str:
        """Text of README.md: metadata, what was corrected, what was measured, how to load it."""
        return self._card_files()[CARD].decode()

    def write_card(self, folder: Path) -> None:
        """Write the model card into `folder`, with its picture where matplotlib is installed."""
        for name, content in self._card_files().items():
            (folder / name).write_bytes(content)

    def _card_files(self) -> dict[str, bytes]:
        license = base_license(self.config.base_model or {})
        return card_files(self.config, self.group_gains, license=license)

    def cut(
        self,
        *,
        rank: int | None = None,
        budget: str | int | None = None,
        rank_step: int = 1,
        max_rank: int | None = None,
    ) -> Correction:
        """The same correction at smaller ranks: the factors are nested, so that nothing is solved again.

        Args:
            rank: largest rank a group keeps.
            budget: instead of `rank`: share of the quantized weights' bytes ("1%") or bytes ("200MB", 4096) that the
                factors may take, or a share of the predicted loss to recover with the fewest bytes ("recover 80%").
            rank_step: what a budget keeps are multiples of it, or all that a group's shape allows.
            max_rank: most ranks that a budget lets a group keep.

        Returns:
            What is kept. Figures that were measured on the whole ("held_out" in its provenance) are no figures of a
            part: they are set aside as those that it was "selected" from.

        Raises:
            RankError: rank below 1.
            ConfigError: the budget cannot be parsed, does not pay for one rank step of any group, or is a target out of
                reach; the gains were never measured; or an argument does not go with another, see
                `glowq.selection.budget.RankRequest`.
        """
        return self.kept(self.choose(RankRequest(rank, budget, rank_step, max_rank)))

    def choose(self, request: RankRequest, factor_dtype: str = "auto") -> dict[str, int]:
        """Group name -> rank of what a request keeps; see `cut`.

        Args:
            request: the whole is kept where it is empty.
            factor_dtype: "int8" where what is kept will be rounded to that, which a budget pays half for.
        """
        group_gains = stored_as(self.group_gains, factor_dtype)
        if request.budget is not None and any(bool(entry.right.any()) for entry in self.factors):  # else no error
            check_measured(group_gains, "the correction")
        return choose_ranks(group_gains, request, self.base_bytes, self.config.total)

    def kept(self, ranks: Mapping[str, int]) -> Correction:
        """The same correction with the first ranks of some groups; see `cut`, which chooses them.

        Args:
            ranks: group name -> rank to keep; groups that are not named are left out.
        """
        factors = [cut_group(entry, ranks[entry.group.name]) for entry in self.factors if entry.group.name in ranks]
        return self._with(factors)

    def _with(self, factors: list[GroupFactors]) -> Correction:
        return replace(self, factors=factors, config=_config_of_part(self.config, factors, self.factor_bytes))

    def to_int8(self) -> Correction:
        """The same correction with factors of a byte a value, half the bytes; see `glowq.factors.int8`.

        Returns:
            Every rank as it was, rounded. Figures that were measured before ("held_out") are set aside as those that
            it was "selected" from.

        Raises:
            RoundingError: rounding is predicted to lose more than the bytes that it saves can win.
        """
        found = self._with([rounded(entry) for entry in self.factors])
        found.config.record(factor_dtype="int8")
        check_rounding(self.group_gains, found.group_gains)
        return found

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
            self.write_card(folder)

        write_directory(target, write)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", target.name), **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: str | None = None,
        base_revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Upload the small form to the Hub in one commit, and return its address, or the pull request's.

        Args:
            repo_id: "name" or "organization/name"; created if missing.
            base_model: Hub name of the base, where the correction was made on a folder of this machine.
            base_revision: its branch, tag or commit; the commit that it stands for now is stored.
            private, create_pr, revision, commit_message, token: see `glowq.artifact.push.push`.

        Raises:
            ConfigError: the base is a folder of this machine, which nobody else can load, and no `base_model` is given.
            HubError: the Hub refuses, cannot be reached, or the upload was interrupted.
        """
        from .push import push

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "correction")
            pushed = push(
                Path(folder) / "correction",
                repo_id,
                base_model=base_model,
                base_revision=base_revision,
                private=private,
                create_pr=create_pr,
                revision=revision,
                commit_message=commit_message,
                token=token,
            )
        return str(pushed["pull_request"] or pushed["commit"])

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        rank: int | None = None,
        budget: str | int | None = None,
        rank_step: int = 1,
        max_rank: int | None = None,
        **hub_kwargs: Any,
    ) -> Correction:
        """Read a saved correction, or of what a cut keeps just that; the model itself is not loaded.

        Args:
            path: a folder that `save_pretrained` wrote, or a Hub name.
            rank, budget, rank_step, max_rank: see `cut`. Which ranks are kept is known before any factor is read.
            **hub_kwargs: to `huggingface_hub.snapshot_download`, e.g. `revision`, `token`, `local_files_only`.

        Raises:
            ModelNotFoundError: no such folder, or it holds no correction.
            CorrectionError: its files are corrupt, or a factor is missing, extra or misshaped.
            NonFiniteError: a factor that was read holds NaN or Inf.
            RankError, ConfigError: see `cut`; also where the budget is larger than the correction, or where the
                correction holds no measured gains.
        """
        request = RankRequest(rank, budget, rank_step, max_rank)
        with open_saved(path, **hub_kwargs) as saved:
            return cls.from_saved(saved, None if rank is None and budget is None else saved.choose(request))

    @classmethod
    def from_saved(cls, saved: SavedCorrection, ranks: Mapping[str, int] | None = None) -> Correction:
        """Read an open correction.

        Args:
            saved: see `glowq.artifact.saved.open_saved`.
            ranks: group name -> rank to keep, see `SavedCorrection.choose`; None: everything.

        Raises:
            NonFiniteError: a factor that was read holds NaN or Inf.
        """
        factors = saved.factors.read(ranks)
        config = saved.config if ranks is None else _config_of_part(saved.config, factors, saved.factors.factor_bytes)
        tokenizer = generation = None
        if (saved.folder / "tokenizer_config.json").is_file():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(saved.folder)
        if (saved.folder / "generation_config.json").is_file():
            from transformers import GenerationConfig

            generation = GenerationConfig.from_pretrained(saved.folder)
        return cls(factors, config, saved.model_config, saved.base_bytes, tokenizer, generation)


def _config_of_part(config: GlowQConfig, factors: Sequence[GroupFactors], of_factor_bytes: int) -> GlowQConfig:
    part = config.with_groups(describe_groups(factors))
    is_part = sum(entry.factor_bytes for entry in factors) < of_factor_bytes
    if is_part and part.provenance.held_out is not None:
        selected: Selected = {"of_factor_bytes": of_factor_bytes, "of_held_out": part.provenance.held_out}
        part.record(held_out=None, selected=selected)
    return part
