"""Several methods at the same bytes on the same model: what each buys with a budget, and what that is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .backends import prepare_model
from .backends.dense import take
from .benefit import Benefit, benefit_map
from .block_solver import to_model
from .correction import Correction
from .errors import UnsupportedModuleError
from .evaluation import Score, score_models
from .groups import Group, trace_groups
from .methods import Method, get_method
from .pipeline import correct
from .runtime import GroupFactors, attach, detach, factor_dtype
from .selection import parse_budget

__all__ = [
    "Comparison",
    "Entry",
    "applied",
    "compare_methods",
    "score_entries",
    "uniform_rank_within",
]

_TRACE_TOKENS = 8


@dataclass(frozen=True)
class Entry:
    """One method at one budget.

    Attributes:
        method: its name.
        budget: as it was asked for.
        budget_bytes: what that is in bytes.
        rank: rank of every group, lowered where a group allows less; None where ranks follow measured gains.
        factors: what the budget bought; nothing where `reason` says why.
        reason: why nothing was bought.
        same_as: the method whose solve this one shares, so that the two corrections are one.
    """

    method: str
    budget: str
    budget_bytes: int
    rank: int | None
    factors: tuple[GroupFactors, ...]
    reason: str | None = None
    same_as: str | None = None

    @property
    def factor_bytes(self) -> int:
        """Bytes of all factors."""
        return sum(entry.factor_bytes for entry in self.factors)

    @property
    def label(self) -> str:
        """Name of the corrected model."""
        return f"{self.method} at {self.budget}"


@dataclass(frozen=True)
class Comparison:
    """Every method at every budget.

    Attributes:
        entries: by method, then by budget, in the orders given.
        base_bytes: bytes of the quantized weights.
        benefit: of the first method that allocates by gain, at the largest budget; None where there is none.
    """

    entries: list[Entry]
    base_bytes: int
    benefit: Benefit | None


def compare_methods(
    model: nn.Module,
    *,
    reference: Any,
    calibration: Tensor,
    methods: Sequence[str],
    budgets: Sequence[str],
    seed: int = 0,
    dense: bool = False,
) -> Comparison:
    """Solve every method once, and cut its factors to every budget; `model` is left without a correction.

    A method whose gains are in one unit for the whole network gets the ranks that gain most. The others get what their
    papers give them: the largest rank that every group can have within the budget, and nothing for the bytes left.
    The inputs of each block are measured behind blocks that carry all that was solved for, whatever is cut later.

    Args:
        model: quantized transformers model.
        reference: the full-precision model: a Hub name, a folder, or a model in memory.
        calibration: token ids, shape (n, length), int64.
        methods: names, see `glowq.methods`.
        budgets: see `glowq.selection.parse_budget`.
        seed: of the solver.
        dense: see `glowq.correct`.

    Raises:
        ConfigError: an unknown method, or a budget that cannot be parsed.
        GlowQError: see `glowq.correct`.
    """
    solvers = [get_method(name) for name in methods]
    if dense:
        take(model)
    backends = prepare_model(model)
    if not backends:
        raise UnsupportedModuleError(
            f"{type(model).__name__} holds no quantized linear module: there is nothing to compare. Quantize it first."
        )
    base_bytes = sum(backend.packed_bytes(model.get_submodule(name)) for name, backend in backends.items())
    available = {budget: parse_budget(budget, base_bytes) for budget in budgets}
    largest = max(available, key=lambda budget: available[budget])
    groups = trace_groups(model, to_model({"input_ids": calibration[:1, :_TRACE_TOKENS]}, model)).groups

    def solve(method: Method, **size: Any) -> Correction:
        options: dict[str, Any] = {"method": method.name, "seed": seed, "dense": dense}
        found = correct(model, reference=reference, calibration=calibration, **options, **size)
        detach(model)
        return found

    entries: list[Entry] = []
    benefit = None
    solved: dict[tuple[Any, ...], Method] = {}
    for method in solvers:
        first = solved.setdefault((method.solve, method.shared, method.statistic, method.two_sided), method)
        if first is not method:
            entries += [
                replace(entry, method=method.name, same_as=first.name)
                for entry in entries
                if entry.method == first.name
            ]
            continue
        itemsize = factor_dtype(model).itemsize
        if method.two_sided:
            found, whole = _by_gain(method, groups, available, largest, itemsize, solve)
            if whole is not None and benefit is None:
                benefit = benefit_map(whole, groups, largest)
        else:
            found = _uniform(method, groups, available, largest, itemsize, solve)
        entries += found
    return Comparison(entries, base_bytes, benefit)


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


def score_entries(
    reference: nn.Module, model: nn.Module, entries: Sequence[Entry], sequences: Tensor
) -> dict[str, Score]:
    """Score the reference, the quantized model, and the quantized model with every entry's factors.

    All run on the same batch before the next one is taken: every figure is paired by sequence.

    Args:
        reference: full-precision model.
        model: quantized, without a correction.
        entries: those without factors, and those that are another method's, are left out.
        sequences: token ids, shape (m, length), int64.

    Returns:
        "reference", "quantized" and each entry's label -> its score.

    Raises:
        EvaluationError, NonFiniteError: see `score_models`.
    """
    models: dict[str, nn.Module] = {"reference": reference, "quantized": model}
    models.update(
        {entry.label: _Corrected(model, entry.factors) for entry in entries if entry.factors and entry.same_as is None}
    )
    scores = score_models(models, sequences)
    for entry in entries:
        if entry.same_as is not None and entry.factors:
            scores[entry.label] = scores[replace(entry, method=entry.same_as).label]
    return scores


@contextmanager
def applied(model: nn.Module, factors: Sequence[GroupFactors]) -> Iterator[nn.Module]:
    """Inside this context `model` carries these factors; afterwards none."""
    try:
        for entry in factors:
            attach(model, entry)
        yield model
    finally:
        detach(model)


class _Corrected(nn.Module):
    """A model that carries factors during its own forwards only, so that many corrections share one model."""

    def __init__(self, model: nn.Module, factors: Sequence[GroupFactors]) -> None:
        super().__init__()
        self.model = model
        self.factors = factors

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        found: torch.device = getattr(self.model, "device", torch.device("cpu"))
        return found

    def forward(self, **inputs: Any) -> Any:
        with applied(self.model, self.factors):
            return self.model(**inputs)


Solve = Callable[..., Correction]


def _uniform(
    method: Method, groups: Sequence[Group], available: Mapping[str, int], largest: str, itemsize: int, solve: Solve
) -> list[Entry]:
    ranks = {
        budget: uniform_rank_within(groups, found, itemsize, shared=method.shared)
        for budget, found in available.items()
    }
    # One solve serves every budget: the factors of every method are nested.
    whole = solve(method, rank=ranks[largest]) if ranks[largest] else None
    entries = []
    for budget, rank in ranks.items():
        if rank and whole is not None:
            factors = tuple(whole.cut(rank=rank).factors)
            entries.append(Entry(method.name, budget, available[budget], rank, factors))
        else:
            cost = itemsize * sum(map(sum, _parts(groups, method.shared)))
            reason = f"one rank of every group takes {cost} bytes, more than the budget"
            entries.append(Entry(method.name, budget, available[budget], None, (), reason))
    return entries


def _by_gain(
    method: Method, groups: Sequence[Group], available: Mapping[str, int], largest: str, itemsize: int, solve: Solve
) -> tuple[list[Entry], Correction | None]:
    cheapest = itemsize * min(map(sum, _parts(groups, method.shared)))
    whole = solve(method, budget=available[largest]) if available[largest] >= cheapest else None
    if whole is not None and whole.factors:  # a group that gains nothing is not sold, however cheap it is
        cheapest = min(entry.factor_bytes // entry.rank for entry in whole.factors)
    entries = []
    for budget, found in available.items():
        if whole is None or found < cheapest:
            dear = f"one rank of the cheapest group takes {cheapest} bytes, more than the budget"
            entries.append(Entry(method.name, budget, found, None, (), dear))
        else:
            cut = whole if budget == largest or not whole.factors else whole.cut(budget=found)
            reason = None if cut.factors else "no rank of any group gains anything"
            entries.append(Entry(method.name, budget, found, None, tuple(cut.factors), reason))
    return entries, whole


def _parts(groups: Sequence[Group], shared: bool) -> list[tuple[int, int]]:
    """(outputs, inputs) of everything that gets a right factor of its own."""
    if shared:
        return [(sum(group.out_features), group.in_features) for group in groups]
    return [(width, group.in_features) for group in groups for width in group.out_features]
