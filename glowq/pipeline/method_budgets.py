"""What each method makes of each budget: one rank for all groups, the ranks that gain most, or whole groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..artifact.correction import Correction
from ..errors import NoGainError
from ..factors.factors import GroupFactors
from ..factors.group import Group
from ..selection.allocation import largest_rank
from ..solving.methods.base import Allocation, Method

__all__ = ["ALLOCATORS", "BudgetContext", "Entry", "fixed_rank_within", "uniform_rank_within"]

_PUBLISHED_RANK = 64  # of GlowQ-S
_NO_GAIN = "no rank of any group gains anything"


@dataclass(frozen=True)
class Entry:
    """One method at one budget.

    Attributes:
        method: its name.
        allocation: how it spends a budget, see `glowq.solving.methods.base.Method`.
        budget: as it was asked for.
        budget_bytes: what that is in bytes.
        rank: rank of every restored group, lowered where a group allows less; None where ranks follow measured gains.
        factors: what fits in the budget; nothing where `reason` says why.
        reason: why nothing fits.
        same_as: the method whose solve this one shares, so that the two corrections are one.
        predicted: see `Correction.predicted`; None where ranks do not follow measured gains.
    """

    method: str
    allocation: Allocation
    budget: str
    budget_bytes: int
    rank: int | None
    factors: tuple[GroupFactors, ...]
    reason: str | None = None
    same_as: str | None = None
    predicted: float | None = None

    @property
    def factor_bytes(self) -> int:
        """Bytes of all factors."""
        return sum(entry.factor_bytes for entry in self.factors)

    @property
    def label(self) -> str:
        """Name of the corrected model."""
        return f"{self.method} at {self.budget}"


@dataclass(frozen=True)
class BudgetContext:
    """What every method is given alike.

    Attributes:
        groups: every group of the model.
        available: budget, as it was asked for -> its bytes; at least one.
        itemsize: bytes of one factor value.
        solve: (method, rank= or budget=) to the correction of that size.
        error_ratios: computes group name -> ||E||_F / ||W||_F.
    """

    groups: Sequence[Group]
    available: Mapping[str, int]
    itemsize: int
    solve: Callable[..., Correction]
    error_ratios: Callable[[], Mapping[str, float]]

    @property
    def largest(self) -> str:
        """The budget of the most bytes: one solve for it serves all, for the factors of every method are nested."""
        return max(self.available, key=lambda budget: self.available[budget])

    def rank_bytes(self, method: Method) -> list[int]:
        """Bytes of one rank of everything that gets a right factor of its own."""
        return [self.itemsize * sum(widths) for widths in _parts(self.groups, method.shared)]


def uniform_rank_within(groups: Sequence[Group], available: int, itemsize: int, *, shared: bool) -> int:
    """The largest rank that every group can have within `available` bytes; 0 where one rank of each costs more.

    A group that allows less than that rank keeps what it allows, and the others may go on.

    Args:
        groups: the groups to correct.
        available: bytes.
        itemsize: bytes of one factor value.
        shared: one right factor a group, or one a member.
    """
    parts = _parts(groups, shared)
    spent, rank, most = 0, 0, max(min(widths) for widths in parts)
    while rank < most:
        spent += itemsize * sum(sum(widths) for widths in parts if min(widths) > rank)
        if spent > available:
            break
        rank += 1
    return rank


def fixed_rank_within(groups: Sequence[Group], available: int, itemsize: int) -> int:
    """The rank of the groups that GlowQ-S chooses among.

    The paper fixes it at 64 and counts groups, not bytes. A budget of bytes may pay for hardly any group at that rank,
    which would leave no choice to measure: the rank is halved until the budget pays for half the bytes of all groups,
    or is 1. Below 64, then, a budget pays for between half and all of them.

    Args:
        groups: the groups to choose among; one that allows less than the rank has what it allows.
        available: bytes.
        itemsize: bytes of one factor value.

    Returns:
        A power of two from 1 to 64, no larger than what some group allows.
    """
    rank, most = _PUBLISHED_RANK, max(map(largest_rank, groups))

    def cost(rank: int) -> int:
        return itemsize * sum(sum(widths) * min(rank, *widths) for widths in _parts(groups, True))

    while rank > 1 and (rank > most or cost(rank) > 2 * available):
        rank //= 2
    return rank


def _uniform(method: Method, context: BudgetContext) -> tuple[list[Entry], Correction | None]:
    ranks = {
        budget: uniform_rank_within(context.groups, found, context.itemsize, shared=method.shared)
        for budget, found in context.available.items()
    }
    most = ranks[context.largest]
    whole = context.solve(method, rank=most) if most else None
    entries = []
    for budget, rank in ranks.items():
        if rank and whole is not None:
            entries.append(_entry(method, context, budget, whole.cut(rank=rank).factors, rank))
        else:
            reason = f"one rank of every group takes {sum(context.rank_bytes(method))} bytes, more than the budget"
            entries.append(_entry(method, context, budget, reason=reason))
    return entries, whole


def _by_gain(method: Method, context: BudgetContext) -> tuple[list[Entry], Correction | None]:
    most, cheapest = context.available[context.largest], min(context.rank_bytes(method))
    try:
        whole = context.solve(method, budget=most) if most >= cheapest else None
    except NoGainError:
        return [_entry(method, context, budget, reason=_NO_GAIN) for budget in context.available], None
    if whole is not None and whole.factors:  # groups that gain nothing get no bytes, so they do not count
        cheapest = min(entry.factor_bytes // entry.rank for entry in whole.factors)
    entries = []
    for budget, found in context.available.items():
        if whole is None or found < cheapest:
            reason = f"one rank of the cheapest group takes {cheapest} bytes, more than the budget"
            entries.append(_entry(method, context, budget, reason=reason))
        else:
            cut = whole if budget == context.largest or not whole.factors else whole.cut(budget=found)
            found_none = None if cut.factors else _NO_GAIN
            entries.append(
                replace(_entry(method, context, budget, cut.factors, reason=found_none), predicted=cut.predicted)
            )
    return entries, whole


def _whole_groups(method: Method, context: BudgetContext) -> tuple[list[Entry], Correction | None]:
    """Groups in the order of their score, not of their score for a byte, until the next does not fit."""
    assert method.score is not None
    ranks = {
        budget: fixed_rank_within(context.groups, found, context.itemsize)
        for budget, found in context.available.items()
    }
    most, cheapest = context.available[context.largest], min(context.rank_bytes(method))
    whole = context.solve(method, rank=ranks[context.largest]) if most >= cheapest else None
    ratios = {} if whole is None else context.error_ratios()
    entries = []
    for budget, rank in ranks.items():
        if whole is None:
            reason = f"one rank of the cheapest group takes {cheapest} bytes, more than the budget"
            entries.append(_entry(method, context, budget, reason=reason))
            continue
        scored = [
            (method.score(entry.gains, ratios[entry.group.name]), entry) for entry in whole.cut(rank=rank).factors
        ]
        ordered = [entry for _, entry in sorted(scored, key=lambda pair: -pair[0])]
        names = _first_within(ordered, context.available[budget])
        if names:
            chosen = [entry for _, entry in scored if entry.group.name in names]
            entries.append(_entry(method, context, budget, chosen, rank))
        else:
            first = f"rank {rank} of the group of the highest score takes {ordered[0].factor_bytes} bytes"
            entries.append(_entry(method, context, budget, reason=f"{first}, more than the budget"))
    return entries, whole


ALLOCATORS: Mapping[Allocation, Callable[[Method, BudgetContext], tuple[list[Entry], Correction | None]]] = {
    "uniform": _uniform,
    "gain": _by_gain,
    "groups": _whole_groups,
}


def _first_within(ordered: Sequence[GroupFactors], available: int) -> set[str]:
    """Names of the first groups that `available` bytes pay for together."""
    names = set()
    for entry in ordered:
        available -= entry.factor_bytes
        if available < 0:
            break
        names.add(entry.group.name)
    return names


def _entry(
    method: Method,
    context: BudgetContext,
    budget: str,
    factors: Sequence[GroupFactors] = (),
    rank: int | None = None,
    reason: str | None = None,
) -> Entry:
    return Entry(method.name, method.allocation, budget, context.available[budget], rank, tuple(factors), reason)


def _parts(groups: Sequence[Group], shared: bool) -> list[tuple[int, int]]:
    """(outputs, inputs) of everything that gets a right factor of its own."""
    if shared:
        return [(sum(group.out_features), group.in_features) for group in groups]
    return [(width, group.in_features) for group in groups for width in group.out_features]
