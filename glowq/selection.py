"""Which ranks a budget of bytes buys."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Mapping, Sequence

from .errors import ConfigError, RankError
from .groups import Group
from .runtime import GroupFactors

__all__ = ["allocate", "candidate_ranks", "parse_budget", "ranks_within", "uniform_ranks"]

_SPREAD = 16  # on the bundled model the best groups get ten even shares
_LEAST_CANDIDATE = 8

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


def uniform_ranks(groups: Sequence[Group], rank: int | None) -> dict[str, int]:
    """Group name -> rank, the same for all, lowered where a group allows less.

    Args:
        groups: the groups to restore.
        rank: rank asked for; 32 unless given.

    Raises:
        RankError: rank below 1, or above what any group allows.
    """
    largest = {group.name: _largest_rank(group) for group in groups}
    rank = 32 if rank is None else rank
    if rank < 1 or rank > max(largest.values()):
        raise RankError(f"rank must lie between 1 and {max(largest.values())} for this model, found {rank}.")
    return {name: min(rank, most) for name, most in largest.items()}


def candidate_ranks(
    groups: Sequence[Group], budget: str | int, base_bytes: int, itemsize: int, *, shared: bool
) -> dict[str, int]:
    """Group name -> rank to solve for, so that `ranks_within` can then choose under a budget.

    A group may end with `_SPREAD` times what an even share of the budget would buy it, and never with more than the
    whole budget would.

    Args:
        groups: the groups that could be restored.
        budget: see `parse_budget`.
        base_bytes: bytes of the quantized weights.
        itemsize: bytes of one factor value.
        shared: one right factor a group, or one a member.

    Raises:
        ConfigError: the budget does not pay for one rank of any group.
    """
    available = parse_budget(budget, base_bytes)
    costs = {group.name: _rank_values(group, shared) * itemsize for group in groups}
    _check_affordable(costs, available, budget, base_bytes)
    even = max(_LEAST_CANDIDATE, math.ceil(_SPREAD * available / sum(costs.values())))
    ranks = {group.name: min(even, _largest_rank(group), available // costs[group.name]) for group in groups}
    return {name: rank for name, rank in ranks.items() if rank > 0}


def ranks_within(
    factors: Sequence[GroupFactors], ranks: Mapping[str, int], budget: str | int, base_bytes: int
) -> dict[str, int]:
    """Group name -> rank under a budget: the ranks that gain most for their bytes, none above `ranks`; 0 is left out.

    Raises:
        ConfigError: the budget does not pay for one rank of any group.
    """
    available = parse_budget(budget, base_bytes)
    costs = {entry.group.name: entry.factor_bytes // entry.rank for entry in factors}
    _check_affordable(costs, available, budget, base_bytes)
    gains = {entry.group.name: entry.gains[: ranks[entry.group.name]].tolist() for entry in factors}
    return {name: rank for name, rank in allocate(gains, costs, available).items() if rank > 0}


def allocate(gains: Mapping[str, Sequence[float]], rank_bytes: Mapping[str, int], available: int) -> dict[str, int]:
    """Ranks by gain per byte.

    Gains of one group fall from rank to rank, so that taking the best next rank each time is optimal up to the last
    bytes, which go to the best rank that still fits.

    Args:
        gains: group name -> what each further rank gains, in one unit for all groups.
        rank_bytes: group name -> bytes of one rank.
        available: bytes.

    Returns:
        Group name -> rank, 0 included.
    """
    ranks = dict.fromkeys(gains, 0)
    offers = [(-gain[0] / rank_bytes[name], name) for name, gain in gains.items() if len(gain) and gain[0] > 0]
    heapq.heapify(offers)
    while offers:
        _, name = heapq.heappop(offers)
        if rank_bytes[name] > available:
            continue  # nor will any later rank of this group fit
        available -= rank_bytes[name]
        ranks[name] += 1
        further = gains[name][ranks[name] :]
        if len(further) and further[0] > 0:
            heapq.heappush(offers, (-further[0] / rank_bytes[name], name))
    return ranks


def _check_affordable(costs: Mapping[str, int], available: int, budget: str | int, base_bytes: int) -> None:
    cheapest = min(costs.values())
    if available < cheapest:
        raise ConfigError(
            f"budget {budget!r} is {available} bytes, but one rank of the cheapest group takes {cheapest} bytes "
            f"({cheapest / base_bytes:.2%}); give at least that."
        )


def _largest_rank(group: Group) -> int:
    return min(sum(group.out_features), group.in_features)


def _rank_values(group: Group, shared: bool) -> int:
    return sum(group.out_features) + group.in_features * (1 if shared else len(group.members))
