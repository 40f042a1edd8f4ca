"""Compare several methods on the same model at the same bytes: solve each method, cut to each budget, and score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact.correction import Correction
from ..errors import RoundingError, UnsupportedModuleError
from ..evaluation.scores import Score, score_models
from ..factors.factors import GroupFactors
from ..factors.units import GainUnit
from ..models.forward import to_model
from ..models.reference import Reference
from ..models.tracing import Trace, trace_groups
from ..models.weight_errors import WeightErrors
from ..quantizers.libraries.dense import adopt_dense
from ..quantizers.model import packed_bytes, prepare_model, read_weight
from ..runtime.attach import applied, detach, factor_dtype
from ..selection.benefit import Benefit, benefit_map
from ..selection.budget import parse_budget
from ..solving.methods.base import Method, get_method
from .block_solver import stops_of
from .correct import correct
from .method_budgets import ALLOCATORS, BudgetContext, Entry
from .sequences import checked_ids

__all__ = ["Comparison", "compare_methods", "distill_entries", "score_entries"]

_TRACE_TOKENS = 8


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
    int8: bool = False,
    seed: int = 0,
    dense: bool = False,
) -> Comparison:
    """Solve every method once, and cut its factors to every budget. Afterwards `model` has no correction attached.

    A method whose gains have one unit for the whole model keeps the ranks that gain most. The other methods keep what
    their papers describe: either the largest rank that every group can have within the budget; or whole groups at a
    fixed rank (see `glowq.pipeline.method_budgets`), in the order of their score, until the next group does not fit.
    These methods do not use the bytes that are left.

    When a block is measured, the blocks before it carry all ranks that were solved for, also those that are cut later.

    Args:
        model: quantized transformers model.
        reference: the full-precision model: a Hub name, a folder, or a model in memory.
        calibration: token ids, shape (n, length), int64.
        methods: names, see `glowq.solving.methods.base`.
        budgets: see `glowq.selection.budget.parse_budget`.
        int8: also compare the first method that allocates by gain with int8 factors, for example as "glowq+int8".
        seed: seed of the solver.
        dense: see `glowq.correct`.

    Raises:
        ConfigError: an unknown method, or a budget that cannot be parsed.
        GlowQError: see `glowq.correct`.
    """
    solvers = [get_method(name) for name in methods]
    if dense:
        adopt_dense(model)
    backends = prepare_model(model)
    if not backends:
        raise UnsupportedModuleError(
            f"{type(model).__name__} holds no quantized linear module: there is nothing to compare. Quantize it first."
        )
    calibration = checked_ids(model, calibration)
    base_bytes = packed_bytes(model)
    available = {budget: parse_budget(budget, base_bytes) for budget in budgets}
    trace = trace_groups(model, to_model({"input_ids": calibration[:1, :_TRACE_TOKENS]}, model))
    done: dict[tuple[Any, ...], Correction] = {}

    def solve(method: Method, **size: Any) -> Correction:
        key = (*_solve_of(method), *size.items())
        if key not in done:
            options: dict[str, Any] = {"method": method.name, "seed": seed, "dense": dense, "force": True}
            done[key] = correct(model, reference=reference, calibration=calibration, **options, **size)
            detach(model)
        return done[key]

    @cache
    def ratios() -> Mapping[str, float]:
        with Reference(reference, type(model), device=getattr(model, "device", None), fresh=model) as source:
            return _error_ratios(WeightErrors(model, source, backends), trace)

    context = BudgetContext(trace.groups, available, factor_dtype(model).itemsize, solve, ratios)
    entries: list[Entry] = []
    benefit = None
    firsts: dict[tuple[Any, ...], Method] = {}
    for method in solvers:
        first = firsts.setdefault((*_solve_of(method), method.allocation, method.score), method)
        if first is not method:
            entries += [
                replace(entry, method=method.name, same_as=first.name)
                for entry in entries
                if entry.method == first.name
            ]
            continue
        found, whole = ALLOCATORS[method.allocation](method, context)
        entries += found
        if method.allocation == "gain" and benefit is None and whole is not None:
            unit = whole.config.provenance.gains or GainUnit.SQUARED_OUTPUT
            benefit = benefit_map(whole.factors, trace.groups, unit, context.largest)
            entries += _in_int8(method, context) if int8 else []
    return Comparison(entries, base_bytes, benefit)


def _in_int8(method: Method, context: BudgetContext) -> list[Entry]:
    """The entries of a method that allocates by gain, with int8 factors; without factors if rounding is refused."""

    def solve(method: Method, **size: Any) -> Correction:
        return context.solve(method, factor_dtype="int8", **size)

    name = f"{method.name}+int8"
    try:
        entries, _ = ALLOCATORS[method.allocation](method, replace(context, itemsize=1, solve=solve))
    except RoundingError as error:
        refused = Entry(
            name, method.allocation, context.largest, context.available[context.largest], None, (), str(error)
        )
        return [replace(refused, budget=budget, budget_bytes=found) for budget, found in context.available.items()]
    return [replace(entry, method=name) for entry in entries]


def distill_entries(
    model: nn.Module, reference: nn.Module, entries: Sequence[Entry], sequences: Tensor, *, steps: int, seed: int = 0
) -> list[Entry]:
    """Distill the factors of the first method that allocates by gain, at every budget.

    Args:
        model: quantized model without a correction.
        reference: full-precision model that can be run.
        entries: entries of `compare_methods`; at least one must allocate by gain.
        sequences: token ids of the calibration text, shape (n, length), int64.
        steps: number of distillation steps, at least 1.
        seed: seed of the order of the sequences.

    Returns:
        New entries, whose method is for example "glowq+distilled".

    Raises:
        GlowQError: see `glowq.calibration.distillation.distill`.
    """
    from ..calibration.distillation import distill

    first = next(entry.method for entry in entries if entry.allocation == "gain")
    return [
        replace(
            entry,
            method=f"{first}+distilled",
            predicted=None,
            factors=tuple(distill(model, reference, entry.factors, sequences, steps=steps, seed=seed)),
        )
        for entry in entries
        if entry.method == first
    ]


def score_entries(
    reference: nn.Module, model: nn.Module, entries: Sequence[Entry], sequences: Tensor
) -> dict[str, Score]:
    """Score the reference, the quantized model, and the quantized model with every entry's factors.

    All models run on one batch before the next batch starts, so that every figure is paired by sequence.

    Args:
        reference: full-precision model.
        model: quantized model without a correction.
        entries: entries without factors are left out. An entry with `same_as` is not run; it gets the score of that
            method.
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


def _solve_of(method: Method) -> tuple[Any, ...]:
    """The attributes of a method that determine its factors at given ranks."""
    return method.solve, method.shared, method.statistic, method.two_sided


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
