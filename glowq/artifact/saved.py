"""A saved correction before its factors are read, so that the ranks to keep can be chosen first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ModelNotFoundError
from ..factors.form import bits_of
from ..models.model_config import read_model_config
from ..selection.allocation import GroupGains
from ..selection.budget import RankRequest, parse_budget, parse_target
from ..selection.ranks import check_measured, choose_ranks
from ..selection.rounding import stored_as
from ..utils.files import refuse_pickles
from ..utils.names import split_revision
from ..utils.snapshots import local_snapshot
from .correction_config import CorrectionConfig
from .custom_code import of_repository
from .factor_headers import FactorHeaders, read_factor_headers

__all__ = ["FACTORS_FILE", "SavedCorrection", "read_saved"]

FACTORS_FILE = "glowq.safetensors"


@dataclass(frozen=True)
class SavedCorrection:
    """A saved correction without the values of its factors.

    Attributes:
        name: folder or Hub name, as it was given.
        folder: local folder of its files.
        config: what config.json stores about the correction.
        model_config: the other fields of config.json, which describe the quantized model.
        headers: what the header of its file says about the factors.
    """

    name: str
    folder: Path
    config: CorrectionConfig
    model_config: dict[str, Any]
    headers: FactorHeaders

    @property
    def base_bytes(self) -> int:
        """Bytes of the quantized weights; 0 if config.json does not state them."""
        return int(self.config.base_bytes or 0)

    def choose(self, request: RankRequest, factor_dtype: str = "auto") -> dict[str, int]:
        """Group name -> rank that a request keeps; see `choose_ranks`.

        Args:
            request: the requested rank or budget; an empty request keeps everything.
            factor_dtype: what the kept factors will be rounded to, so that a rank takes fewer bytes.

        Raises:
            RankError: rank below 1.
            ConfigError: the budget is larger than the correction, too small for any rank, or a target that the factors
                cannot reach; or the correction holds no measured gains.
        """
        group_gains = stored_as(self.headers.group_gains, factor_dtype)
        if request.budget is not None:
            self._check_budget(request.budget, group_gains, f" in {factor_dtype}" if bits_of(factor_dtype) else "")
        return choose_ranks(group_gains, request, self.base_bytes, self.config.total)

    def _check_budget(self, budget: str | int, group_gains: Sequence[GroupGains], kind: str) -> None:
        if not self.base_bytes:
            raise ConfigError(f"{self.name} does not say how many bytes its quantized weights take; correct again.")
        check_measured(group_gains, self.name)
        available = None if parse_target(budget) is not None else parse_budget(budget, self.base_bytes)
        whole = sum(item.rank_bytes * len(item.gains) for item in group_gains)
        if available is not None and available > whole:  # ranks that were not solved cannot be selected
            raise ConfigError(
                f"budget {budget!r} is {available} bytes, but {self.name} has only {whole}{kind} "
                f"({whole / self.base_bytes:.2%}); give less, or correct again with a larger --budget or --rank."
            )


def read_saved(path: str | os.PathLike[str], **hub_kwargs: Any) -> SavedCorrection:
    """Read config.json of a saved correction, and check the headers of its factors. No factor is read.

    Args:
        path: a folder that `Correction.save_pretrained` wrote, or a Hub name.
        **hub_kwargs: arguments of `huggingface_hub.snapshot_download`.

    Raises:
        ModelNotFoundError: no such folder, or it holds no correction.
        CorrectionError: its files are corrupt, or a factor is missing, extra or misshaped.
    """
    folder = local_snapshot(path, **hub_kwargs)
    refuse_pickles(folder)
    model_config = read_model_config(folder / "config.json")
    stored = model_config.pop("quantization_config", None)
    if not isinstance(stored, dict) or stored.get("quant_method") != "glowq":
        raise ModelNotFoundError(f"{path}: its config.json names no glowq correction.")
    config = CorrectionConfig.of_file(os.fspath(path), stored)
    if config.format != "correction":
        raise ModelNotFoundError(
            f"{path} is a self-contained glowq model, not a correction: load it with from_pretrained."
        )
    model_config.pop("transformers_weights", None)
    if "auto_map" in model_config and not os.path.isdir(path):
        model_config["auto_map"] = of_repository(model_config["auto_map"], split_revision(os.fspath(path))[0])
    headers = read_factor_headers([folder / FACTORS_FILE], config.groups or {})
    return SavedCorrection(os.fspath(path), folder, config, model_config, headers)
