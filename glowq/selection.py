"""Which ranks a budget buys: of bytes, or of as many bytes as reach a share of the predicted error."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from .allocation import Offer, Step, allocate, by_benefit, largest_rank, reach
from .errors import ConfigError, RankError
from .groups import Group

__all__ = [
    "RankRequest",
    "candidate_ranks",
    "check_measured",
    "choose_ranks",
    "parse_budget",
    "parse_target",
    "uniform_ranks",
]

_SPREAD = 16  # ranks are solved for before they are chosen: a group that gains far more must not be cut short
_LEAST_CANDIDATE = 8
_TARGET_BUDGET = "10%"  # a target names no bytes to solve for; most targets take less

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
        found = Fraction(share.group(1)) / 100 * base_bytes  # not float: 0.7% of 10,000 bytes is 70 of them
    elif size is not None and size.group(2) in _UNITS:
        found = Fraction(size.group(1)) * _UNITS[size.group(2)]
    else:
        raise ConfigError(
            f"budget {budget!r} is neither a share ('1.5%') nor a size ('200MB', 4096 bytes), nor, where a correction "
            "is cut, a target ('recover 80%')."
        )
    if found <= 0:
        raise ConfigError(f"budget {budget!r} must be above zero.")
    if found < 1 and share is None:
        share_meant = f"{float(found) * 100:g}%"
        raise ConfigError(f"budget {budget!r} is less than one byte; a share is written with %: {share_meant!r}.")
    return int(found)


def parse_target(budget: str | int | float) -> float | None:
    """The share of the predicted error that a budget such as "recover 80%" asks for; None where it is one of bytes.

    Raises:
        ConfigError: a target whose share is missing, or does not lie between 0% and 100%.
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
    """How many ranks the groups are to have: one number for all, or what a budget buys.

    Attributes:
        rank: of every group, lowered where a group allows less.
        budget: bytes (see `parse_budget`), or a target (see `parse_target`).
        rank_step: a budget buys ranks in multiples of this. The one exception is a group whose shape ends between two
            multiples: it may get all that its shape allows.
        max_rank: most ranks that a budget buys any group.

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
            raise ConfigError("rank_step and max_rank limit what a budget buys: give a budget with them, or neither.")
        if self.max_rank is not None and self.max_rank < self.rank_step:
            raise ConfigError(
                f"max_rank {self.max_rank} is below one rank_step of {self.rank_step}; nothing would fit."
            )
        if self.budget is not None and parse_target(self.budget) is None:
            parse_budget(self.budget, 10**12)


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

    A group may end with `_SPREAD` times what an even share of the budget would buy it, and never with more than the
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


def choose_ranks(offers: Sequence[Offer], request: RankRequest, base_bytes: int, total: float) -> dict[str, int]:
    """Group name -> rank of what a request keeps of the ranks held; groups that keep none are left out.

    Args:
        offers: one a group.
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
        held = {offer.group.name: len(offer.gains) for offer in offers}
        return {name: rank if request.rank is None else min(request.rank, rank) for name, rank in held.items()}
    steps = by_benefit(offers, request.rank_step, request.max_rank)
    if not steps and any(gain > 0 for offer in offers for gain in offer.gains):
        raise ConfigError(
            f"no group holds the {request.rank_step} ranks of one rank_step (the largest has "
            f"{max(len(offer.gains) for offer in offers)}); give a smaller one, or correct again with a larger budget "
            "or rank (--budget, --rank)."
        )
    target = parse_target(request.budget)
    if target is not None:
        bought = _reached(steps, request.budget, target, total)
    else:
        available = parse_budget(request.budget, base_bytes)
        firsts = {step.name: step for step in reversed(steps)}.values()
        if firsts:
            _check_affordable(min(step.bytes for step in firsts), available, request, base_bytes)
        bought = allocate(steps, available)
    return {step.name: step.rank for step in bought}


def check_measured(offers: Sequence[Offer], name: str) -> None:
    """Refuse to choose between groups by measurements that were never made.

    Raises:
        ConfigError: no rank of any group says what it gains.
    """
    if not any(any(offer.gains) for offer in offers):
        raise ConfigError(
            f"{name} holds no measured gains to select by; `glowq correct --budget ...` writes a correction that does."
        )


def _reached(steps: Sequence[Step], budget: str | int, target: float, total: float) -> list[Step]:
    if total <= 0:
        raise ConfigError(f"budget {budget!r}: no error was measured, so that there is nothing to recover.")
    bought = reach(steps, target * total)
    if bought is None:
        most = math.floor(1000 * math.fsum(step.gain for step in steps) / total) / 1000
        raise ConfigError(
            f"budget {budget!r} is out of reach: these factors recover at most a predicted {most:.1%} of the loss. "
            "Ask for less, or correct again with a larger budget in bytes or a larger rank (--budget, --rank)."
        )
    return bought


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
