"""Choose the ranks for a budget of bytes, or for a target: a share of the predicted error to recover."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import ConfigError, RankError
from ..factors.form import FactorForm
from ..factors.group import Group
from .allocation import GroupGains, Step, allocate, by_benefit, largest_rank, reach
from .budget import RankRequest, parse_budget, parse_target

__all__ = ["candidate_ranks", "check_measured", "choose_ranks", "uniform_ranks"]

_SPREAD = 16  # factors are solved before ranks are chosen: a group with a far larger gain needs more than an even share
_LEAST_CANDIDATE = 8
_TARGET_BUDGET = "10%"  # for targets, which give no number of bytes to solve for; most targets take less


def uniform_ranks(groups: Sequence[Group], rank: int | None) -> dict[str, int]:
    """Group name -> rank: the same for all groups, but lowered if a group allows less.

    Args:
        groups: the groups to correct.
        rank: the requested rank; None means 32.

    Raises:
        RankError: the rank is below 1, or above the largest rank that any group allows.
    """
    largest = {group.name: largest_rank(group) for group in groups}
    rank = 32 if rank is None else rank
    if rank < 1 or rank > max(largest.values()):
        raise RankError(f"rank must lie between 1 and {max(largest.values())} for this model, found {rank}.")
    return {name: min(rank, most) for name, most in largest.items()}


def candidate_ranks(
    groups: Sequence[Group], request: RankRequest, base_bytes: int, form: FactorForm, *, shared: bool
) -> dict[str, int]:
    """Group name -> rank to solve for, so that `choose_ranks` can later choose smaller ranks within a budget.

    The rank of a group is `_SPREAD` times the rank that an even share of the budget allows, but not more than the whole
    budget allows. A target is treated as a budget of `_TARGET_BUDGET`, but no group is left out.

    Args:
        groups: the groups that can be corrected.
        request: must hold a budget.
        base_bytes: bytes of the quantized weights.
        form: how the factors will be stored.
        shared: True for one right factor per group, False for one per member.

    Raises:
        ConfigError: the budget is too small for one rank step of any group.
    """
    assert request.budget is not None
    is_target, step = parse_target(request.budget) is not None, request.rank_step
    available = parse_budget(_TARGET_BUDGET if is_target else request.budget, base_bytes)
    costs = {group.name: _rank_bytes(group, form, shared) for group in groups}
    if not is_target:
        smallest = min(costs[group.name] * min(step, largest_rank(group)) for group in groups)
        _check_large_enough(smallest, available, request, base_bytes)
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
    """Group name -> rank to keep of the available ranks; groups that keep none are left out.

    Args:
        group_gains: one entry per group.
        request: what to keep; an empty request keeps everything.
        base_bytes: bytes of the quantized weights.
        total: error of the whole model without a correction, in the unit of the gains.

    Raises:
        RankError: the rank is below 1.
        ConfigError: the budget is too small for one rank step of any group, every group has fewer ranks than one step,
            or the target cannot be reached.
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
            _check_large_enough(min(step.bytes for step in firsts), available, request, base_bytes)
        chosen = allocate(steps, available)
    return {step.name: step.rank for step in chosen}


def check_measured(group_gains: Sequence[GroupGains], name: str) -> None:
    """Raise an error if there are no measured gains to choose between groups.

    Raises:
        ConfigError: no rank of any group has a measured gain.
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


def _check_large_enough(smallest: int, available: int, request: RankRequest, base_bytes: int) -> None:
    if available < smallest:
        what = "one rank" if request.rank_step == 1 else f"one step of {request.rank_step} ranks"
        least = -(-smallest * 10**4 // base_bytes) / 10**4  # rounded up, so that the share in the message is enough
        raise ConfigError(
            f"budget {request.budget!r} is {available} bytes, but {what} of the smallest group takes {smallest} bytes "
            f"({least:.2%}); give at least that."
        )


def _rank_bytes(group: Group, form: FactorForm, shared: bool) -> int:
    parts = [group] if shared else group.apart()
    return sum(form.rank_bytes(part.widths) for part in parts)
