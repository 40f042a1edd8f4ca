"""What to solve for each method of a comparison, so that one pass over the text serves all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...artifact.build import stored_config
from ...artifact.request import CorrectionRequest
from ...errors import NoGainError, RoundingError
from ...factors.factors import GroupFactors
from ...factors.form import bits_of
from ...selection.budget import RankRequest
from ...selection.ranks import candidate_ranks, uniform_ranks
from ...solving.methods.base import Method
from ..block_solver import Job
from ..finish import finished
from ..problem import Problem
from ..sequences import split_sequences
from .budgets import ALLOCATORS, NO_GAIN, BudgetContext, Entry, refused

__all__ = ["Plan", "plans_of", "split", "twin_key"]


@dataclass(frozen=True)
class Plan:
    """A method, with what to solve for it.

    Attributes:
        method: the method.
        context: bytes of the budgets, and of one factor value.
        size: what to solve; None if not even the largest budget holds a rank.
        job: the same as ranks.
        factor_dtype: what the factors are rounded to; "float" if they are not.
    """

    method: Method
    context: BudgetContext
    size: RankRequest | None
    job: Job | None
    factor_dtype: str

    @property
    def name(self) -> str:
        """Name of the entries, for example "glowq+int8"."""
        return self.method.name if self.factor_dtype == "float" else f"{self.method.name}+{self.factor_dtype}"

    @property
    def labels(self) -> list[str]:
        """Labels of the entries, one per budget."""
        return [f"{self.name} at {budget}" for budget in self.context.available]

    @property
    def job_key(self) -> tuple[Any, ...]:
        """Plans with the same key need the same factors."""
        ranks = () if self.job is None else tuple(self.job.ranks.items())
        return (*_solve_of(self.method), ranks)

    def entries(
        self, problem: Problem, solved: Mapping[Any, list[GroupFactors]], reference: Any, calibration: Tensor
    ) -> list[Entry]:
        """One entry per budget."""
        whole = None
        if self.size is not None:
            request = CorrectionRequest(
                rank=self.size.rank,
                budget=self.size.budget,
                method=self.method.name,
                factor_dtype=self.factor_dtype,
                seed=problem.seed,
                force=True,
            )
            config = stored_config(
                problem.model, reference, problem.base_bytes, self.method.name, calibration, problem.seed
            )
            try:
                whole = finished(problem, self.method, solved[self.job_key], request, config, None)
            except NoGainError:
                return self._named(refused(self.method, self.context, NO_GAIN))
            except RoundingError as error:
                return self._named(refused(self.method, self.context, str(error)))
        return self._named(ALLOCATORS[self.method.allocation].entries(self.method, self.context, whole))

    def _named(self, entries: Sequence[Entry]) -> list[Entry]:
        return [replace(entry, method=self.name) for entry in entries]


def plans_of(
    methods: Sequence[Method], context: BudgetContext, factor_dtypes: Sequence[str], base_bytes: int
) -> list[Plan]:
    """What to solve: each method that differs from the earlier ones, and the first that allocates by gain rounded too.

    Args:
        methods: the methods, without duplicates.
        context: bytes of the budgets.
        factor_dtypes: what to round the factors of that method to, once each.
        base_bytes: bytes of the quantized weights.
    """
    plans: list[Plan] = []
    seen = set()
    for method in methods:
        if twin_key(method) in seen:
            continue
        seen.add(twin_key(method))
        plans.append(_plan(method, context, "float", base_bytes))
        if method.allocation == "gain" and all(plan.factor_dtype == "float" for plan in plans):
            for name in factor_dtypes:
                smaller = replace(context, form=replace(context.form, bits=bits_of(name)))
                plans.append(_plan(method, smaller, name, base_bytes))
    return plans


def _plan(method: Method, context: BudgetContext, factor_dtype: str, base_bytes: int) -> Plan:
    size = ALLOCATORS[method.allocation].size(method, context)
    job = None
    if size is not None:
        groups = context.groups
        job = Job(
            method,
            uniform_ranks(groups, size.rank)
            if size.budget is None
            else candidate_ranks(groups, size, base_bytes, context.form, shared=method.shared),
        )
    return Plan(method, context, size, job, factor_dtype)


def split(calibration: Tensor, plans: Sequence[Plan], seed: int) -> tuple[Tensor, Tensor | None]:
    """The part of the text to calibrate on, and the part that groups are measured on, which some methods need.

    Args:
        calibration: token ids, shape (n, length), int64.
        plans: what will be solved.
        seed: seed of the split.
    """
    for plan in sorted(plans, key=lambda plan: plan.method.allocation != "gain"):
        if plan.size is not None:
            return split_sequences(calibration, plan.method, plan.size, plan.factor_dtype, seed)
    return calibration, None


def twin_key(method: Method) -> tuple[Any, ...]:
    """Methods for which this is equal have the same entries."""
    return (*_solve_of(method), method.allocation, method.score)


def _solve_of(method: Method) -> tuple[Any, ...]:
    """The attributes of a method that determine its factors at given ranks."""
    return method.solve, method.shared, method.statistic, method.two_sided
