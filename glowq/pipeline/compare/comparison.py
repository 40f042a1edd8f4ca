"""Compare several methods on the same model at the same bytes: solve each method, cut to each budget, and score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...evaluation.cloze import ClozeItems, ClozeScore, cloze_scores
from ...evaluation.scores import Score, score_models
from ...factors.factors import GroupFactors
from ...factors.form import FactorForm
from ...models.tracing import Trace
from ...models.weight_errors import WeightErrors
from ...quantizers.model import packed_bytes, read_weight
from ...runtime.attach import applied, factor_dtype
from ...selection.benefit import Benefit, benefit_map
from ...selection.budget import parse_budget
from ...solving.methods.base import get_method
from ..block_solver import stops_of
from ..prepared import opened, readable_modules, traced
from ..problem import Problem
from ..sequences import check_token_count, checked_ids
from .budgets import BudgetContext, Entry
from .cells import Cells
from .plans import plans_of, split, twin_key

__all__ = ["Comparison", "cloze_entries", "compare_methods", "distill_entries", "score_entries"]

_Text = TypeVar("_Text")
_Score = TypeVar("_Score")


@dataclass(frozen=True)
class Comparison:
    """Every method at every budget.

    Attributes:
        entries: ordered by method, then by budget; both in the order given.
        base_bytes: bytes of the quantized weights.
        benefit: predicted benefit of the first method that allocates by gain, at the largest budget; None if no method
            does.
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
    factor_dtypes: Sequence[str] = (),
    seed: int = 0,
    dense: bool = False,
    cells: Cells | None = None,
) -> Comparison:
    """Solve every method in one pass over the text, and cut its factors to every budget.

    A method whose gains have one unit for the whole model keeps the ranks that gain most. The other methods keep what
    their papers describe: either the largest rank that every group can have within the budget; or whole groups at a
    fixed rank (see `glowq.pipeline.compare.budgets`), in the order of their score, until the next group does not fit.
    These methods do not use the bytes that are left.

    Args:
        model: quantized transformers model.
        reference: the full-precision model: a Hub name, a folder, or a model in memory.
        calibration: token ids, shape (n, length), int64.
        methods: names, see `glowq.solving.methods.base`.
        budgets: see `glowq.selection.budget.parse_budget`.
        factor_dtypes: also compare the first method that allocates by gain with factors of these dtypes, for example as
            "glowq+int4".
        seed: seed of the solver.
        dense: see `glowq.correct`.
        cells: store what is finished.

    Raises:
        ConfigError: an unknown method, or a budget that cannot be parsed.
        GlowQError: see `glowq.correct`.
    """
    cells = cells or Cells()
    solvers = list(dict.fromkeys(get_method(name) for name in methods))
    backends = readable_modules(model, dense)
    calibration = checked_ids(model, calibration)
    trace = traced(model, calibration)
    base_bytes = packed_bytes(model)
    available = {budget: parse_budget(budget, base_bytes) for budget in budgets}
    with opened(reference, model, trace, calibration, dense=dense) as source:

        @cache
        def ratios() -> Mapping[str, float]:
            return _error_ratios(WeightErrors(model, source, backends), trace)

        context = BudgetContext(trace.groups, available, FactorForm(None, factor_dtype(model).itemsize), ratios)
        plans = plans_of(solvers, context, factor_dtypes, base_bytes)
        train, held = split(calibration, plans, seed)
        problem = Problem(model, source, backends, trace, train, held, base_bytes, seed)
        stored = {plan.name: [cells.entry(label) for label in plan.labels] for plan in plans}
        left = [plan for plan in plans if None in stored[plan.name]]
        jobs = {
            plan.job_key: replace(plan.job, resume=cells.resume(plan.name)) for plan in left if plan.job is not None
        }
        for job in jobs.values():
            check_token_count(train, job.ranks)
        solved = dict(zip(jobs, problem.solve(list(jobs.values())) if jobs else [], strict=True))
        entries: list[Entry] = []
        for plan in plans:
            found = [entry for entry in stored[plan.name] if entry is not None]
            if plan in left:
                found = plan.entries(problem, solved, reference, calibration)
                for entry in found:
                    cells.keep(entry)
            entries += found
    return Comparison(_with_twins(methods, entries), base_bytes, _benefit(entries, trace, context))


def _benefit(entries: Sequence[Entry], trace: Trace, context: BudgetContext) -> Benefit | None:
    for entry in entries:
        if entry.gains is not None and entry.budget == context.largest:
            return benefit_map(entry.factors, trace.groups, entry.gains, context.largest)
    return None


def _with_twins(names: Sequence[str], entries: Sequence[Entry]) -> list[Entry]:
    """The entries in the order of the names; a method that solves as an earlier one does gets the entries of that."""
    found: list[Entry] = []
    firsts: dict[tuple[Any, ...], str] = {}
    for name in dict.fromkeys(names):
        first = firsts.setdefault(twin_key(get_method(name)), name)
        own = [entry for entry in entries if entry.method.partition("+")[0] == first]
        if first == name:
            found += own
        else:
            found += [replace(entry, method=name, same_as=first) for entry in own if entry.method == first]
    return found


def distill_entries(
    model: nn.Module,
    reference: nn.Module,
    entries: Sequence[Entry],
    sequences: Tensor,
    *,
    steps: int | str,
    seed: int = 0,
    cells: Cells | None = None,
) -> list[Entry]:
    """Distill the factors of the first method that allocates by gain, at every budget: the last rounded ones, if any.

    Args:
        model: quantized model without a correction.
        reference: full-precision model that can be run.
        entries: entries of `compare_methods`; at least one must allocate by gain.
        sequences: token ids of the calibration text, shape (n, length), int64.
        steps: number of distillation steps, at least 1; "auto" for as many as pay.
        seed: seed of the order of the sequences.
        cells: store what is finished.

    Returns:
        New entries, whose method is for example "glowq+distilled", or "glowq+int4+distilled".

    Raises:
        GlowQError: see `glowq.calibration.distillation.distill`.
    """
    from ...calibration.distillation import distill

    cells = cells or Cells()
    first = next(entry.method for entry in entries if entry.allocation == "gain")
    *_, chosen = [first, *(entry.method for entry in entries if entry.method.startswith(f"{first}+"))]
    found = []
    for entry in (entry for entry in entries if entry.method == chosen):
        distilled = replace(entry, method=f"{entry.method}+distilled", predicted=None, gains=None)
        kept = cells.entry(distilled.label)
        if kept is None:
            bits = entry.factors[0].bits if entry.factors else None
            factors, _ = distill(model, reference, entry.factors, sequences, steps=steps, bits=bits, seed=seed)
            kept = replace(distilled, factors=tuple(factors))
            cells.keep(kept)
        found.append(kept)
    return found


def score_entries(
    reference: nn.Module,
    model: nn.Module,
    entries: Sequence[Entry],
    sequences: Tensor,
    cells: Cells | None = None,
) -> dict[str, Score]:
    """Score the reference, the quantized model, and the quantized model with every entry's factors.

    All models run on one batch before the next batch starts, so that every figure is paired by sequence.

    Args:
        reference: full-precision model.
        model: quantized model without a correction.
        entries: entries without factors are left out. An entry with `same_as` is not run; it gets the score of that
            method.
        sequences: token ids, shape (m, length), int64.
        cells: store what is finished.

    Returns:
        "reference", "quantized" and each entry's label -> its score.

    Raises:
        EvaluationError, NonFiniteError: see `score_models`.
    """
    keep = (cells or Cells()).scores(Score, "scores")
    return _run(partial(score_models, keep=keep), reference, model, entries, sequences)


def cloze_entries(
    reference: nn.Module,
    model: nn.Module,
    entries: Sequence[Entry],
    items: ClozeItems,
    cells: Cells | None = None,
) -> dict[str, ClozeScore]:
    """Let the same models answer a cloze test; see `score_entries`."""
    keep = (cells or Cells()).scores(ClozeScore, "cloze")
    return _run(partial(cloze_scores, keep=keep), reference, model, entries, items)


def _run(
    score: Callable[[Mapping[str, nn.Module], _Text], dict[str, _Score]],
    reference: nn.Module,
    model: nn.Module,
    entries: Sequence[Entry],
    text: _Text,
) -> dict[str, _Score]:
    """Let `score` run the models that `score_entries` describes.

    Args:
        score: function of named models and `text`; it returns the score of every model.
        reference, model, entries: see `score_entries`.
        text: what `score` takes.

    Returns:
        See `score_entries`.
    """
    models: dict[str, nn.Module] = {"reference": reference, "quantized": model}
    models.update(
        {entry.label: _Corrected(model, entry.factors) for entry in entries if entry.factors and entry.same_as is None}
    )
    scores = score(models, text)
    for entry in entries:
        if entry.same_as is not None and entry.factors:
            scores[entry.label] = scores[replace(entry, method=entry.same_as).label]
    return scores


class _Corrected(nn.Module):
    """Attaches factors to a model only during its own forward, so that many corrections can share one model."""

    def __init__(self, model: nn.Module, factors: Sequence[GroupFactors]) -> None:
        super().__init__()
        self.model = model
        self.factors = factors

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        found: torch.device = getattr(self.model, "device", torch.device("cpu"))
        return found

    def forward(self, **inputs: Any) -> Any:
        with applied(self.model, self.factors):
            return self.model(**inputs)


def _error_ratios(weight_errors: WeightErrors, trace: Trace) -> dict[str, float]:
    """Group name -> ||E||_F / ||W||_F. W is the reference's weight with the quantized model's channel scales."""
    ratios = {}
    for groups in stops_of(trace, {group.name for group in trace.groups}).values():
        errors = weight_errors.errors(groups)
        for group in groups:
            modules = {name: weight_errors.model.get_submodule(name) for name in group.members}
            quantized = [read_weight(weight_errors.backends[name], name, module) for name, module in modules.items()]
            error = errors[group.name]
            ratios[group.name] = float(error.norm() / (error + torch.cat(quantized)).norm())
    return ratios
