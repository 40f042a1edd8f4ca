"""Which ranks a budget gives: of bytes, or of as many bytes as reach a share of the predicted error."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import ConfigError, RankError
from ..factors.group import Group
from .allocation import GroupGains, Step, allocate, by_benefit, largest_rank, reach
from .budget import RankRequest, parse_budget, parse_target

__all__ = ["candidate_ranks", "check_measured", "choose_ranks", "uniform_ranks"]

_SPREAD = 16  # ranks are solved for before they are chosen: a group that gains far more must not be cut short
_LEAST_CANDIDATE = 8
_TARGET_BUDGET = "10%"  # a target names no bytes to solve for; most targets take less


def uniform_ranks(groups: Sequence[Group], rank: int | None) -> dict[str, int]:
    """Group name -> rank, the same for all, lowered where a group allows less.

    Args:
        groups: the groups to restore.
        rank: rank asked for; 32 unless given.

    Raises:
        RankError: rank below 1, or above what any group allows.
    """
    largest = {group.name: largest_rank(group) for group in groups}
    rank = 32 if rank is None else rank
    if rank < 1 or rank > max(largest.values()):
        raise RankError(f"rank must lie between 1 and {max(largest.values())} for this model, found {rank}.")
    return {name: min(rank, most) for name, most in largest.items()}


def candidate_ranks(
    groups: Sequence[Group], request: RankRequest, base_bytes: int, itemsize: int, *, shared: bool
) -> dict[str, int]:
    """Group name -> rank to solve for, so that `choose_ranks` can then choose under a budget.

    A group may end with `_SPREAD` times what an even share of the budget would give it, and never with more than the
    whole budget would. A target is solved for as a budget of `_TARGET_BUDGET` is, every group included.

    Args:
        groups: the groups that could be restored.
        request: holds a budget.
        base_bytes: bytes of the quantized weights.
        itemsize: bytes of one factor value.
        shared: one right factor a group, or one a member.

    Raises:
        ConfigError: the budget does not pay for one rank step of any group.
    """
    assert request.budget is not None
    is_target, step = parse_target(request.budget) is not None, request.rank_step
    available = parse_budget(_TARGET_BUDGET if is_target else request.budget, base_bytes)
    costs = {group.name: _rank_values(group, shared) * itemsize for group in groups}
    if not is_target:
        cheapest = min(costs[group.name] * min(step, largest_rank(group)) for group in groups)
        _check_affordable(cheapest, available, request, base_bytes)
    even = max(_LEAST_CANDIDATE, math.ceil(_SPREAD * available / sum(costs.values())))
    even = math.ceil(even / step) * step
    ranks = {}
    for group in groups:
        largest, most = largest_rank(group), even if request.max_rank is None else min(even, request.max_rank)
        most = most if is_target else min(most, available // costs[group.name])
        ranks[group.name] = largest if most >= largest else most // step * step
    return {name: rank for name, rank in ranks.items() if rank > 0}


def choose_ranks(
    group_gains: Sequence[GroupGains], request: RankRequest, base_bytes: int, total: float
) -> dict[str, int]:
    """Group name -> rank of what a request keeps of the ranks held; groups that keep none are left out.

    Args:
        group_gains: one a group.
        request: the whole is kept where it is empty.
        base_bytes: bytes of the quantized weights.
        total: error of the whole model before any rank, in the unit of the gains.

    Raises:
        RankError: rank below 1.
        ConfigError: the budget does not pay for one rank step of any group, no group holds as many ranks as one step
            has, or a target is out of reach.
    """
    if request.budget is None:
        if request.rank is not None and request.rank < 1:
            raise RankError(f"rank must be at least 1, found {request.rank}.")
        held = {item.group.name: len(item.gains) for item in group_gains}
        return {name: rank if request.rank is None else min(request.rank, rank) for name, rank in held.items()}
    steps = by_benefit(group_gains, request.rank_step, request.max_rank)
    if not steps and any(gain > 0 for item in group_gains for gain in item.gains):
        raise ConfigError(
            f"no group holds the {request.rank_step} ranks of one rank_step (the largest has "
            f"{max(len(item.gains) for item in group_gains)}); give a smaller one, or correct again with a larger "
            "budget or rank (--budget, --rank)."
        )
    target = parse_target(request.budget)
    if target is not None:
        chosen = _reached(steps, request.budget, target, total)
    else:
        available = parse_budget(request.budget, base_bytes)
        firsts = {step.name: step for step in reversed(steps)}.values()
        if firsts:
            _check_affordable(min(step.bytes for step in firsts), available, request, base_bytes)
        chosen = allocate(steps, available)
    return {step.name: step.rank for step in chosen}


def check_measured(group_gains: Sequence[GroupGains], name: str) -> None:
    """Refuse to choose between groups by measurements that were never made.

    Raises:
        ConfigError: no rank of any group says what it gains.
    """
    if not any(any(item.gains) for item in group_gains):
        raise ConfigError(
            f"{name} holds no measured gains to select by; `glowq correct --budget ...` writes a correction that does."
        )


def _reached(steps: Sequence[Step], budget: str | int, target: float, total: float) -> list[Step]:
    if total <= 0:
        raise ConfigError(f"budget {budget!r}: no error was measured, so that there is nothing to recover.")
    chosen = reach(steps, target * total)
    if chosen is None:
        most = math.floor(1000 * math.fsum(step.gain for step in steps) / total) / 1000
        raise ConfigError(
            f"budget {budget!r} is out of reach: these factors recover at most a predicted {most:.1%} of the loss. "
            "Ask for less, or correct again with a larger budget in bytes or a larger rank (--budget, --rank)."
        )
    return chosen


def _check_affordable(cheapest: int, available: int, request: RankRequest, base_bytes: int) -> None:
    if available < cheapest:
        what = "one rank" if request.rank_step == 1 else f"one step of {request.rank_step} ranks"
        least = -(-cheapest * 10**4 // base_bytes) / 10**4  # rounded up, so that what is said is enough
        raise ConfigError(
            f"budget {request.budget!r} is {available} bytes, but {what} of the cheapest group takes {cheapest} bytes "
            f"({least:.2%}); give at least that."
        )


def _rank_values(group: Group, shared: bool) -> int:
    return sum(group.out_features) + group.in_features * (1 if shared else len(group.members))
