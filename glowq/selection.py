"""How many ranks a budget of bytes buys."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .errors import ConfigError, RankError
from .groups import Group
from .runtime import GroupFactors

__all__ = ["parse_budget", "ranks_within", "uniform_rank", "uniform_ranks"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_budget(budget: str | int | float, base_bytes: int) -> int:
    """A budget in bytes.

    Args:
        budget: a share of the quantized weights ("1.5%"), a size ("200MB", "512KiB"), or a number of bytes.
        base_bytes: bytes of the quantized weights.

    Raises:
        ConfigError: not a positive share or size.
    """
    text = str(budget).strip().upper()
    share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B|)", text)
    if share is not None:
        found = float(share.group(1)) / 100 * base_bytes
    elif size is not None and size.group(2) in _UNITS:
        found = float(size.group(1)) * _UNITS[size.group(2)]
    else:
        raise ConfigError(f"budget {budget!r} is neither a share ('1.5%') nor a size ('200MB', 4096 bytes).")
    if found <= 0:
        raise ConfigError(f"budget {budget!r} must be above zero.")
    return int(found)


def uniform_rank(rank_bytes: int, budget: str | int, base_bytes: int) -> int:
    """The largest rank that every group can have within a budget.

    Args:
        rank_bytes: bytes of one rank of every group together.
        budget: see `parse_budget`.
        base_bytes: bytes of the quantized weights.

    Raises:
        ConfigError: the budget does not pay for rank 1; the message says what would.
    """
    available = parse_budget(budget, base_bytes)
    if available < rank_bytes:
        raise ConfigError(
            f"budget {budget!r} is {available} bytes, but one rank of every group takes {rank_bytes} bytes "
            f"({rank_bytes / base_bytes:.2%}); give at least that."
        )
    return available // rank_bytes


def uniform_ranks(
    groups: Sequence[Group],
    rank: int | None,
    budget: str | int | None,
    base_bytes: int,
    itemsize: int,
    *,
    shared: bool,
) -> dict[str, int]:
    """Group name -> rank, the same for all, lowered where a group allows less.

    Args:
        groups: the groups to restore.
        rank: rank asked for; 32 if neither it nor `budget` is given.
        budget: largest uniform rank within these bytes, see `parse_budget`.
        base_bytes: bytes of the quantized weights.
        itemsize: bytes of one factor value.
        shared: one right factor a group, or one a member.

    Raises:
        RankError: rank below 1, or above what any group allows.
        ConfigError: see `uniform_rank`.
    """
    largest = {group.name: min(sum(group.out_features), group.in_features) for group in groups}
    if budget is not None:
        rank = uniform_rank(sum(_rank_values(group, shared) for group in groups) * itemsize, budget, base_bytes)
        rank = min(rank, max(largest.values()))
    rank = 32 if rank is None else rank
    if rank < 1 or rank > max(largest.values()):
        raise RankError(f"rank must lie between 1 and {max(largest.values())} for this model, found {rank}.")
    return {name: min(rank, most) for name, most in largest.items()}


def _rank_values(group: Group, shared: bool) -> int:
    return sum(group.out_features) + group.in_features * (1 if shared else len(group.members))


def ranks_within(
    factors: Sequence[GroupFactors], ranks: Mapping[str, int], budget: str | int, base_bytes: int
) -> dict[str, int]:
    """Group name -> rank under a budget: the largest uniform rank that fits, never more than a group has.

    Raises:
        ConfigError: see `uniform_rank`.
    """
    available = parse_budget(budget, base_bytes)
    cost = {entry.group.name: entry.factor_bytes // entry.rank for entry in factors}

    def total(rank: int) -> int:
        return sum(cost[name] * min(rank, largest) for name, largest in ranks.items())

    best = uniform_rank(total(1), budget, base_bytes)
    while best > 1 and total(best) > available:
        best -= 1
    while total(best + 1) <= available and total(best + 1) > total(best):
        best += 1
    return {name: min(best, largest) for name, largest in ranks.items()}
