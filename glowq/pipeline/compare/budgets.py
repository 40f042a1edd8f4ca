"""How each method allocates a budget: one rank for all groups, ranks by gain or by effective rank, or whole groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...artifact.correction import Correction
from ...factors.factors import GroupFactors
from ...factors.form import FactorForm
from ...factors.group import Group
from ...factors.units import GainUnit
from ...selection.allocation import largest_rank
from ...selection.budget import RankRequest
from ...selection.effective_rank import effective_rank
from ...solving.methods.base import Allocation, Method

__all__ = ["ALLOCATORS", "NO_GAIN", "BudgetContext", "Entry", "fixed_rank_within", "refused", "uniform_rank_within"]

_PUBLISHED_RANK = 64  # rank of the groups in the paper's GlowQ-S
_SPREAD = 4  # times the rank that every group could have: the most that any group gets by its effective rank
NO_GAIN = "no rank of any group gains anything"


@dataclass(frozen=True)
class Entry:
    """One method at one budget.

    Attributes:
        method: name of the method.
        allocation: how the method allocates a budget, see `glowq.solving.methods.base.Method`.
        budget: the budget as the user gave it.
        budget_bytes: the budget in bytes.
        rank: rank of every restored group, lowered if a group allows less; None if ranks follow measured gains.
        factors: factors that fit in the budget; empty if there are none, see `reason`.
        reason: why there are no factors; None if there are some.
        same_as: name of the method that gives the same correction, if this method was not solved itself.
        predicted: see `Correction.predicted`; None if ranks do not follow measured gains.
        gains: unit of the gains of the factors; None if ranks do not follow measured gains.
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
    gains: GainUnit | None = None

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
    """Inputs that are the same for every method.

    Attributes:
        groups: every group of the model.
        available: budget as the user gave it -> its bytes; at least one.
        form: how the factors are stored.
        error_ratios: function that returns group name -> ||E||_F / ||W||_F.
    """

    groups: Sequence[Group]
    available: Mapping[str, int]
    form: FactorForm
    error_ratios: Callable[[], Mapping[str, float]]

    @property
    def largest(self) -> str:
        """The budget with the most bytes. Its factors are nested, so they also serve every smaller budget."""
        return max(self.available, key=lambda budget: self.available[budget])

    def rank_bytes(self, method: Method) -> list[int]:
        """Bytes of one rank of each right factor and its left factors."""
        return [self.form.rank_bytes(widths) for widths in _parts(self.groups, method.shared)]


def uniform_rank_within(groups: Sequence[Group], available: int, form: FactorForm, *, shared: bool) -> int:
    """The largest rank that every group can have within `available` bytes; 0 if one rank of each takes more.

    If a group's shape allows only a smaller rank, it keeps that rank, and the other groups can still get more.

    Args:
        groups: the groups to correct.
        available: bytes.
        form: how the factors are stored.
        shared: True for one right factor per group, False for one per member.
    """
    parts = _parts(groups, shared)
    spent, rank, most = 0, 0, max(map(_largest_rank, parts))
    while rank < most:
        spent += sum(form.rank_bytes(widths) for widths in parts if _largest_rank(widths) > rank)
        if spent > available:
            break
        rank += 1
    return rank


def fixed_rank_within(groups: Sequence[Group], available: int, form: FactorForm) -> int:
    """The rank of the groups that GlowQ-S chooses from.

    The paper fixes the rank at 64 and counts groups, not bytes. At that rank, a budget of bytes may hold almost no
    group, and then there is no choice to compare. So the rank is halved until the budget holds at least half the bytes
    of all groups, or the rank is 1. If this makes the rank smaller than 64, the budget holds between half and all of
    these bytes.

    Args:
        groups: the groups to choose from. A group whose shape allows only a smaller rank has that rank.
        available: bytes.
        form: how the factors are stored.

    Returns:
        A power of two from 1 to 64. At least one group allows this rank.
    """
    rank, most = _PUBLISHED_RANK, max(map(largest_rank, groups))

    def cost(rank: int) -> int:
        return sum(form.rank_bytes(widths) * min(rank, _largest_rank(widths)) for widths in _parts(groups, True))

    while rank > 1 and (rank > most or cost(rank) > 2 * available):
        rank //= 2
    return rank


def _uniform_size(method: Method, context: BudgetContext) -> RankRequest | None:
    rank = _uniform_rank(method, context, context.largest)
    return RankRequest(rank=rank) if rank else None


def _uniform(method: Method, context: BudgetContext, whole: Correction | None) -> list[Entry]:
    entries = []
    for budget in context.available:
        rank = _uniform_rank(method, context, budget)
        if rank and whole is not None:
            entries.append(_entry(method, context, budget, whole.cut(rank=rank).factors, rank))
        else:
            reason = f"one rank of every group takes {sum(context.rank_bytes(method))} bytes, more than the budget"
            entries.append(_entry(method, context, budget, reason=reason))
    return entries


def _uniform_rank(method: Method, context: BudgetContext, budget: str) -> int:
    available = context.available[budget]
    return uniform_rank_within(context.groups, available, context.form, shared=method.shared)


def _gain_size(method: Method, context: BudgetContext) -> RankRequest | None:
    most = context.available[context.largest]
    return RankRequest(budget=most) if most >= min(context.rank_bytes(method)) else None


def _by_gain(method: Method, context: BudgetContext, whole: Correction | None) -> list[Entry]:
    smallest = min(context.rank_bytes(method))
    if whole is not None and whole.factors:  # groups without gain get no bytes, so their bytes do not matter
        smallest = min(entry.factor_bytes // entry.rank for entry in whole.factors)
    entries = []
    for budget, found in context.available.items():
        if whole is None or found < smallest:
            reason = f"one rank of the smallest group takes {smallest} bytes, more than the budget"
            entries.append(_entry(method, context, budget, reason=reason))
        else:
            cut = whole if budget == context.largest or not whole.factors else whole.cut(budget=found)
            entry = _entry(method, context, budget, cut.factors, reason=None if cut.factors else NO_GAIN)
            unit = whole.config.provenance.gains or GainUnit.SQUARED_OUTPUT
            entries.append(replace(entry, predicted=cut.predicted, gains=unit))
    return entries


def _groups_size(method: Method, context: BudgetContext) -> RankRequest | None:
    most = context.available[context.largest]
    if most < min(context.rank_bytes(method)):
        return None
    return RankRequest(rank=fixed_rank_within(context.groups, most, context.form))


def _whole_groups(method: Method, context: BudgetContext, whole: Correction | None) -> list[Entry]:
    """Take whole groups in the order of their score (not of score per byte), until the next group does not fit."""
    assert method.score is not None
    smallest = min(context.rank_bytes(method))
    ratios = {} if whole is None else context.error_ratios()
    entries = []
    for budget, available in context.available.items():
        if whole is None:
            reason = f"one rank of the smallest group takes {smallest} bytes, more than the budget"
            entries.append(_entry(method, context, budget, reason=reason))
            continue
        rank = fixed_rank_within(context.groups, available, context.form)
        scored = [
            (method.score(entry.gains, ratios[entry.group.name]), entry) for entry in whole.cut(rank=rank).factors
        ]
        ordered = [entry for _, entry in sorted(scored, key=lambda pair: -pair[0])]
        names = _first_within(ordered, available)
        if names:
            chosen = [entry for _, entry in scored if entry.group.name in names]
            entries.append(_entry(method, context, budget, chosen, rank))
        else:
            first = f"rank {rank} of the group of the highest score takes {ordered[0].factor_bytes} bytes"
            entries.append(_entry(method, context, budget, reason=f"{first}, more than the budget"))
    return entries


def _effective_size(method: Method, context: BudgetContext) -> RankRequest | None:
    costs, most = context.rank_bytes(method), context.available[context.largest]
    if most < min(costs):
        return None
    largest = max(map(largest_rank, context.groups))
    return RankRequest(rank=min(largest, _SPREAD * max(1, math.ceil(most / sum(costs)))))


def _by_effective_rank(method: Method, context: BudgetContext, whole: Correction | None) -> list[Entry]:
    """Ranks in proportion to sqrt(R / bytes of a rank), R being the effective rank of each group's weighted error."""
    entries = []
    for budget, available in context.available.items():
        steps: list[tuple[float, str, int, int]] = []
        for entry in () if whole is None else whole.factors:
            cost = entry.factor_bytes // entry.rank
            directions = largest_rank(entry.group)
            weight = math.sqrt(effective_rank(entry.gains, entry.total, directions) / cost)
            steps += [(rank / weight, entry.group.name, rank, cost) for rank in range(1, entry.rank + 1)]
        ranks: dict[str, int] = {}
        for _, name, rank, cost in sorted(steps):
            available -= cost
            if available < 0:
                break
            ranks[name] = rank
        if whole is not None and ranks:
            entries.append(_entry(method, context, budget, whole.kept(ranks).factors))
        else:
            reason = "the first rank takes more bytes than the budget"
            entries.append(_entry(method, context, budget, reason=reason))
    return entries


@dataclass(frozen=True)
class Allocator:
    """How a kind of methods uses budgets.

    Attributes:
        size: function (method, context) -> the ranks or the budget to solve for, of which every budget's factors are a
            part; None if not even the largest budget holds a rank.
        entries: function (method, context, the correction of that size or None) -> one entry per budget.
    """

    size: Callable[[Method, BudgetContext], RankRequest | None]
    entries: Callable[[Method, BudgetContext, Correction | None], list[Entry]]


ALLOCATORS: Mapping[Allocation, Allocator] = {
    "uniform": Allocator(_uniform_size, _uniform),
    "gain": Allocator(_gain_size, _by_gain),
    "groups": Allocator(_groups_size, _whole_groups),
    "effective-rank": Allocator(_effective_size, _by_effective_rank),
}


def _first_within(ordered: Sequence[GroupFactors], available: int) -> set[str]:
    """Names of the first groups that fit together in `available` bytes."""
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


def refused(method: Method, context: BudgetContext, reason: str) -> list[Entry]:
    """One entry per budget, without factors, for a method that was refused."""
    return [_entry(method, context, budget, reason=reason) for budget in context.available]


def _parts(groups: Sequence[Group], shared: bool) -> list[tuple[int, ...]]:
    """(inputs, outputs of each member) of each right factor: of each group if `shared`, else of each module."""
    parts = groups if shared else [part for group in groups for part in group.apart()]
    return [part.widths for part in parts]


def _largest_rank(widths: tuple[int, ...]) -> int:
    inputs, *outputs = widths
    return min(inputs, sum(outputs))
