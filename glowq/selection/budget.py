"""Parse what a user asks for: a budget of bytes, a share of the loss to recover, limits of the ranks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from ..errors import ConfigError

__all__ = ["RankRequest", "parse_budget", "parse_target"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_budget(budget: str | int | float, base_bytes: int) -> int:
    """Convert a budget to bytes.

    Args:
        budget: a share of the quantized weights ("1.5%"), a size ("200MB", "512KiB"), or a number of bytes.
        base_bytes: bytes of the quantized weights.

    Raises:
        ConfigError: the budget is not a positive share or size.
    """
    text = str(budget).strip().upper()
    share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B|)", text)
    if share is not None:
        found = Fraction(share.group(1)) / 100 * base_bytes  # a float would be inexact: 0.7% of 10,000 bytes is 70
    elif size is not None and size.group(2) in _UNITS:
        found = Fraction(size.group(1)) * _UNITS[size.group(2)]
    else:
        raise ConfigError(
            f"budget {budget!r} is neither a share ('1.5%') nor a size ('200MB', 4096 bytes) nor, where a target is "
            "allowed, a target ('recover 80%')."
        )
    if found <= 0:
        raise ConfigError(f"budget {budget!r} must be above zero.")
    if found < 1 and share is None:
        share_meant = f"{float(found) * 100:g}%"
        raise ConfigError(f"budget {budget!r} is less than one byte; a share is written with %: {share_meant!r}.")
    return int(found)


def parse_target(budget: str | int | float) -> float | None:
    """Return the share of the predicted error that a budget such as "recover 80%" asks for; None for a budget of bytes.

    Raises:
        ConfigError: the share of a target is missing, or not between 0% and 100%.
    """
    text = str(budget).strip().lower()
    if not text.startswith("recover"):
        return None
    share = re.fullmatch(r"recover\s*(\d+(?:\.\d+)?)\s*%", text)
    if share is None or not 0 < float(share.group(1)) < 100:
        raise ConfigError(
            f"budget {budget!r}: expected 'recover' and a share of the predicted loss above 0% and below 100%, as in "
            "'recover 80%'."
        )
    return float(share.group(1)) / 100


@dataclass(frozen=True)
class RankRequest:
    """The ranks that are requested for the groups: one rank for all, or the ranks that a budget allows.

    Attributes:
        rank: rank of every group, lowered if a group allows less.
        budget: bytes (see `parse_budget`), or a target (see `parse_target`).
        rank_step: a budget gives ranks in multiples of this. The only exception is the largest rank that the shape of a
            group allows, which need not be a multiple.
        max_rank: largest rank that a budget gives a group.

    Raises:
        ConfigError: rank and budget are both given, the budget cannot be parsed, rank_step or max_rank is below 1 or
            given without a budget, or max_rank is below rank_step.
    """

    rank: int | None = None
    budget: str | int | None = None
    rank_step: int = 1
    max_rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.budget is not None:
            raise ConfigError("give either rank or budget, not both.")
        for name, value in (("rank_step", self.rank_step), ("max_rank", self.max_rank)):
            if name == "max_rank" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, found {value!r}.")
        if self.budget is None and (self.rank_step != 1 or self.max_rank is not None):
            raise ConfigError("rank_step and max_rank limit what a budget gives: give a budget with them, or neither.")
        if self.max_rank is not None and self.max_rank < self.rank_step:
            raise ConfigError(
                f"max_rank {self.max_rank} is below one rank_step of {self.rank_step}; nothing would fit."
            )
        if self.budget is not None and parse_target(self.budget) is None:
            parse_budget(self.budget, 10**12)
