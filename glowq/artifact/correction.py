"""`Correction`: the result of correcting a model. It can be saved, loaded, cut, rounded and uploaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from ..factors.factors import GroupFactors, cut_group
from ..factors.form import bits_of, dtype_name
from ..factors.rounding import round_group
from ..models.loading import load_generation_config
from ..models.preprocessors import load_tokenizer
from ..selection.allocation import GroupGains
from ..selection.budget import RankRequest
from ..selection.ranks import check_measured, choose_ranks
from ..selection.rounding import check_rounding, stored_as
from ..utils.output import write_directory
from ..utils.scratch import temporary_folder
from .card import CARD, base_license, card_files
from .config import GlowQConfig
from .correction_files import write_correction
from .custom_code import code_in
from .factor_files import read_factors
from .factor_tensors import describe_groups, factor_tensors
from .provenance import Selected
from .saved import FACTORS_FILE, SavedCorrection, read_saved

__all__ = ["Correction"]


@dataclass(repr=False)
class Correction:
    """The factors of every restored group, and their origin.

    Attributes:
        factors: one entry per restored group, in the order of the model's forward, or by name if read from files.
        config: what config.json stores about the correction: base quantizer, base model, groups, method, seed.
        model_config: the quantized model's own fields of config.json, without its quantization.
        base_bytes: bytes of the quantized weights at their nominal bit width; budgets in percent refer to them.
        tokenizer: tokenizer or processor, saved next to the factors, so that the folder works in a pipeline; or None.
        generation_config: saved next to the factors if the model has one; or None.
        unstored: why the base that `config.base_model` names cannot be loaded again as it is in memory; None if it can.
        code: file name -> content of custom code that defines the model's class; saved next to the factors.
    """

    factors: list[GroupFactors]
    config: GlowQConfig
    model_config: dict[str, Any]
    base_bytes: int
    tokenizer: Any = None
    generation_config: Any = None
    unstored: str | None = None
    code: Mapping[str, bytes] = field(default_factory=dict)

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
        """Share of the whole model's predicted loss that the factors remove; None if no loss was measured."""
        total = self.config.total
        return math.fsum(chain.from_iterable(entry.gains.tolist() for entry in self.factors)) / total if total else None

    def __repr__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "empty"
        forms = {dtype_name(entry.bits) for entry in self.factors} - {"float"}
        kind = f" of {forms.pop()}" if len(forms) == 1 else ""
        return f"Correction({len(self.factors)} groups, {shown}, {self.factor_bytes} bytes{kind}, +{self.overhead:.2%})"

    @property
    def group_gains(self) -> list[GroupGains]:
        """The gain and the bytes of each rank of each group; a budget is allocated by them."""
        return [
            GroupGains(entry.group, entry.factor_bytes // entry.rank, entry.gains.tolist()) for entry in self.factors
        ]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the file stores, on the CPU: `<group>.right` (r, d) and `<member>.left` (o, r)."""
        return factor_tensors(self.factors)

    def model_card(self) -> str:
        """Text of README.md: metadata, what was corrected, what was measured, and how to load the model."""
        return self._card_files()[CARD].decode()

    def write_card(self, folder: Path) -> None:
        """Write the model card into `folder`, with its plot if matplotlib is installed."""
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
        """The same correction with smaller ranks. The factors are nested, so nothing is solved again.

        Args:
            rank: largest rank that a group keeps.
            budget: instead of `rank`: share of the quantized weights' bytes ("1%") or bytes ("200MB", 4096) that the
                factors may take, or a share of the predicted loss to recover with the fewest bytes ("recover 80%").
            rank_step: with a budget, each group keeps a multiple of this rank, or the largest rank of its shape.
            max_rank: with a budget, largest rank that a group keeps.

        Returns:
            The smaller correction. Figures that were measured with all ranks ("held_out" in the provenance) are not
            valid for it; they are moved to "selected" in its provenance.

        Raises:
            RankError: rank below 1.
            ConfigError: the budget cannot be parsed, is too small for one rank step of any group, or is a target that
                the factors cannot reach; the gains were never measured; or two arguments exclude each other, see
                `glowq.selection.budget.RankRequest`.
        """
        return self.kept(self.choose(RankRequest(rank, budget, rank_step, max_rank)))

    def choose(self, request: RankRequest, factor_dtype: str = "auto") -> dict[str, int]:
        """Group name -> rank that a request keeps; see `cut`.

        Args:
            request: the requested rank or budget; an empty request keeps everything.
            factor_dtype: what the kept factors will be rounded to, so that a rank takes fewer bytes.
        """
        group_gains = stored_as(self.group_gains, factor_dtype)
        # If all factors are zero, the model has no error, and its gains of zero are correct.
        if request.budget is not None and any(bool(entry.right.any()) for entry in self.factors):
            check_measured(group_gains, "the correction")
        return choose_ranks(group_gains, request, self.base_bytes, self.config.total)

    def kept(self, ranks: Mapping[str, int]) -> Correction:
        """The same correction with only the given ranks; `cut` also chooses them.

        Args:
            ranks: group name -> rank to keep; groups that are not named are left out.
        """
        factors = [cut_group(entry, ranks[entry.group.name]) for entry in self.factors if entry.group.name in ranks]
        return self._with(factors)

    def _with(self, factors: list[GroupFactors]) -> Correction:
        return replace(self, factors=factors, config=_config_of_part(self.config, factors, self.factor_bytes))

    def rounded(self, factor_dtype: str) -> Correction:
        """The same correction with factors of fewer bits, see `glowq.factors.integers`.

        Args:
            factor_dtype: "int8", "int4" or "int3": about a half, 27% or 20% of the bytes of 16-bit floats.

        Returns:
            The correction with all its ranks, rounded. Figures that were measured before ("held_out" in the provenance)
            are moved to "selected" in its provenance.

        Raises:
            ConfigError: the dtype is none of these, or the factors have as few bits already.
            RoundingError: rounding is predicted to lose more accuracy than the saved bytes can give back.
        """
        bits = bits_of(factor_dtype)
        if bits is None:
            raise ConfigError(f"factors are rounded to int8, int4 or int3: name one of them, not {factor_dtype}.")
        least = min((entry.bits for entry in self.factors if entry.bits is not None), default=None)
        if least is not None and least <= bits:
            raise ConfigError(f"the factors are in {dtype_name(least)} already; rounding to {factor_dtype} saves none.")
        found = self._with([round_group(entry, bits) for entry in self.factors])
        found.config.record(factor_dtype=factor_dtype, improvement=None, change=None, instead=None)
        check_rounding(self.group_gains, found.group_gains, factor_dtype)
        return found

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write the small form: config.json, glowq.safetensors, tokenizer files, model card.

        If an error occurs, nothing is written. After `import glowq`, plain `from_pretrained` loads the folder as a
        model; the base is found by its name.

        Args:
            save_directory: created if missing. An empty folder is accepted, and an earlier result that holds only what
                glowq wrote, unchanged (glowq_manifest.json lists it); that result is replaced.
            push_to_hub: also upload the folder.
            **kwargs: arguments of `push_to_hub`; `repo_id` defaults to the folder's name.

        Raises:
            OutputError: the directory holds other files, cannot be written, or the disk is full.
            ConfigError: the base, as it is in memory, is stored nowhere.
        """
        target = Path(save_directory)
        write_directory(target, self.write_files)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", target.name), **kwargs)

    def write_files(self, folder: Path) -> None:
        """Write the files of the small form into an empty folder; `save_pretrained` can also replace an earlier result.

        Raises:
            ConfigError: the base, as it is in memory, is stored nowhere.
        """
        write_correction(self, folder)

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
        """Upload the small form to the Hub in one commit, and return the URL of the commit or the pull request.

        Args:
            repo_id: "name" or "organization/name"; created if missing.
            base_model: Hub name of the base, if the correction was made on a local folder.
            base_revision: branch, tag or commit of `base_model`; the commit that it names now is stored.
            private, create_pr, revision, commit_message, token: see `glowq.artifact.hub.push.push`.

        Raises:
            ConfigError: the base is a local folder, which nobody else can load, and no `base_model` is given.
            HubError: the Hub refuses, cannot be reached, or the upload was interrupted.
        """
        from .hub.push import push

        with temporary_folder("push") as folder:
            self.write_files(folder)
            pushed = push(
                folder,
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
        """Read a saved correction, or only the ranks that a cut keeps. The model itself is not loaded.

        Args:
            path: a folder that `save_pretrained` wrote, or a Hub name.
            rank, budget, rank_step, max_rank: see `cut`. The ranks are chosen before any factor is read, and only they
                are read.
            **hub_kwargs: arguments of `huggingface_hub.snapshot_download`, e.g. `revision`, `token`,
                `local_files_only`.

        Raises:
            ModelNotFoundError: no such folder, or it holds no correction.
            CorrectionError: its files are corrupt, or a factor is missing, extra or misshaped.
            NonFiniteError: a factor that was read holds NaN or Inf.
            RankError, ConfigError: see `cut`; also if the budget is larger than the correction, or if the correction
                holds no measured gains.
        """
        request = RankRequest(rank, budget, rank_step, max_rank)
        saved = read_saved(path, **hub_kwargs)
        return cls.from_saved(saved, None if rank is None and budget is None else saved.choose(request))

    @classmethod
    def from_saved(cls, saved: SavedCorrection, ranks: Mapping[str, int] | None = None) -> Correction:
        """Read the factors of a saved correction.

        Args:
            saved: see `glowq.artifact.saved.read_saved`.
            ranks: group name -> rank to keep, see `SavedCorrection.choose`; None keeps everything.

        Raises:
            NonFiniteError: a factor that was read holds NaN or Inf.
        """
        config = GlowQConfig(**saved.config.to_dict())
        factors = read_factors([saved.folder / FACTORS_FILE], config.groups or {}, ranks)
        if ranks is not None:
            config = _config_of_part(config, factors, saved.headers.factor_bytes)
        tokenizer = generation = None
        if (saved.folder / "tokenizer_config.json").is_file():
            tokenizer = load_tokenizer(str(saved.folder))
        if (saved.folder / "generation_config.json").is_file():
            generation = load_generation_config(saved.folder)
        code = code_in(saved.folder, saved.model_config)
        return cls(factors, config, saved.model_config, saved.base_bytes, tokenizer, generation, code=code)


def _config_of_part(config: GlowQConfig, factors: Sequence[GroupFactors], of_factor_bytes: int) -> GlowQConfig:
    part = config.with_groups(describe_groups(factors))
    is_part = sum(entry.factor_bytes for entry in factors) < of_factor_bytes
    if is_part:
        part.record(improvement=None, change=None, instead=None)  # they are of all ranks
    if is_part and part.provenance.held_out is not None:
        selected: Selected = {"of_factor_bytes": of_factor_bytes, "of_held_out": part.provenance.held_out}
        part.record(held_out=None, selected=selected)
    return part
