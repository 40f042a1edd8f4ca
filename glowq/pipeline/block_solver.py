"""`BlockSolver`: computes the factors of each block from its weight errors and input moments, for several methods."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.block_walk import BlockWalk
from ..calibration.input_moments import MomentCollector
from ..calibration.pooled_moments import families, moments_of
from ..calibration.text_gap import TextGap, text_gap
from ..data.inputs import Samples, batches
from ..factors.factors import GroupFactors
from ..factors.group import Group
from ..models.forward import to_model
from ..models.reference import Reference
from ..models.tracing import Trace
from ..models.weight_errors import WeightErrors
from ..quantizers.base import Backend
from ..runtime.attach import factor_dtype
from ..solving.methods.base import Method, Statistic
from ..solving.moments import Moments, OutputMoment, of_divided_outputs
from ..utils.logging import progress
from ..utils.names import some_of
from ..utils.timeline import stage
from .block_store import Resume

__all__ = ["BlockSolver", "Job", "stops_of"]

_logger = logging.getLogger(__name__)

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Job:
    """A correction to solve.

    Attributes:
        method: computes factors from a group's weight error and moments.
        ranks: group name -> rank; groups that are not named are left out.
        resume: stores its finished blocks.
    """

    method: Method
    ranks: Mapping[str, int]
    resume: Resume = field(default_factory=Resume)

    def groups(self, groups: Sequence[Group]) -> list[Group]:
        """Those of `groups` that the correction has."""
        return [group for group in groups if group.name in self.ranks]


class BlockSolver:
    """Solves a model's groups block by block, for several corrections in one pass over the text.

    Args:
        model: quantized model; corrected in place.
        reference: full-precision weights.
        backends: module name -> backend of every quantized module.
        jobs: the corrections.
        seed: seed of the solver.
        outputs: group name -> second moment of the loss gradient at the outputs that the group has in the reference, if
            a method uses it.

    Attributes:
        gaps: group name -> what its ranks gain on other text, of some groups of the middle block, if one correction is
            solved by a method that allocates by gain, and this block was not finished by an earlier run.
        pooled: names of the groups that got fewer tokens than their rank, and took the moments of all experts.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: Reference,
        backends: Mapping[str, Backend],
        jobs: Sequence[Job],
        seed: int,
        outputs: Mapping[str, OutputMoment],
    ) -> None:
        self.model = model
        self.weight_errors = WeightErrors(model, reference, backends)
        self.jobs = jobs
        self.seed = seed
        self.outputs = outputs
        self.gaps: dict[str, TextGap] = {}
        self.pooled: dict[str, None] = {}

    @stage("blocks")
    def solve(self, stops: Mapping[str, Sequence[Group]], sequences: Samples) -> list[list[GroupFactors]]:
        """Solve every group of every job.

        The inputs are those of the reference: those of the quantized model are damaged by the errors of the blocks
        before, which the correction removes. They do not depend on the corrections, so that one pass serves all jobs.

        Args:
            stops: what `stops_of` returned.
            sequences: token ids of the calibration text, shape (n, length), int64, or samples of another kind.

        Returns:
            For every job, the factors of its groups, in the order of `stops`.
        """
        solved: list[list[GroupFactors]] = [[] for _ in self.jobs]
        reference = self.weight_errors.reference.model
        inputs = [to_model(batch, reference) for batch in batches(sequences, _batch_size(sequences))]
        inputs = inputs[::2] + inputs[1::2]  # both halves, which are compared, hold all kinds of the text
        middle = list(stops)[len(stops) // 2]
        halved = middle if middle and len(self.jobs) == 1 and self.jobs[0].method.allocation == "gain" else None
        bar = progress(total=len(inputs) * len(stops), desc="Correcting", unit="block")
        with bar, BlockWalk(reference, inputs, list(stops)) as walk:
            for stop, groups in stops.items():
                found = [job.resume.load(stop, job.groups(groups)) for job in self.jobs]
                left = [job for job, kept in zip(self.jobs, found, strict=True) if kept is None]
                new = iter(self._solve_block(walk, stop, groups, left, bar, halved=stop == halved) if left else ())
                if not left:
                    bar.update(len(inputs))
                for entries, kept in zip(solved, found, strict=True):
                    entries.extend(next(new) if kept is None else kept)
        if self.pooled:
            _logger.warning(
                "%s got fewer tokens than ranks: their input is taken to be that of all experts of their layer. "
                "More calibration text tells them apart.",
                some_of(list(self.pooled)),
            )
        return solved

    def _solve_block(
        self, walk: BlockWalk, stop: str, groups: Sequence[Group], jobs: Sequence[Job], bar: Any, *, halved: bool
    ) -> list[list[GroupFactors]]:
        errors = self.weight_errors.errors(groups)
        moments: dict[Statistic, dict[str, Moments]] = {"none": dict.fromkeys(errors, Moments(tokens=0))}
        many = {group.name for family in families(groups) if len(family) > 1 for group in family}
        collectors = {
            statistic: [
                self._collector(group, None if group.name in many else errors[group.name], statistic)
                for group in groups
            ]
            for statistic in dict.fromkeys(job.method.statistic for job in jobs)
            if statistic != "none"
        }
        every = [one for several in collectors.values() for one in several]
        first: dict[str, Moments] = {}
        for done, _ in enumerate(walk.collect(stop, every) if every else walk.batches, start=1):
            bar.update()
            if halved and done == len(walk.batches) // 2:
                first = {one.group.name: one.moments() for one in every if one.error is None and one.tokens}
        ranks = {group.name: max(job.ranks.get(group.name, 0) for job in jobs) for group in groups}
        for statistic, several in collectors.items():
            moments[statistic], pooled = moments_of(several, ranks)
            self.pooled |= {group.name: None for group in pooled}
        solved = [self._factors_of(job, job.groups(groups), errors, moments[job.method.statistic]) for job in jobs]
        for group in (group for group in groups if group.name in first and group.name not in self.pooled):
            self._compare_halves(jobs[0], group, errors[group.name], first[group.name], moments["second"][group.name])
        for job, factors in zip(jobs, solved, strict=True):
            job.resume.save(stop, factors)
        return solved

    def _output_moment(self, group: Group) -> OutputMoment | None:
        """The output moment of a group as the quantized model has its outputs, which a quantizer may have scaled."""
        moment, rows = self.outputs.get(group.name), self.weight_errors.row_scales(group)
        return moment if moment is None or rows is None else of_divided_outputs(moment, rows)

    def _collector(self, group: Group, error: Tensor | None, statistic: Statistic) -> MomentCollector:
        narrow = sum(group.out_features) < group.in_features  # E S E^T, shape (O, O), is then smaller than S, (d, d)
        scale = self.weight_errors.scales.get(group.members[0])
        divisor = None if scale is None else scale.columns
        return MomentCollector(group, statistic, error if narrow else None, divisor)

    @stage("solving")
    def _compare_halves(self, job: Job, group: Group, error: Tensor, first: Moments, whole: Moments) -> None:
        if whole.tokens > first.tokens:
            whole = replace(whole, output=self._output_moment(group))
            self.gaps[group.name] = text_gap(error, first, whole, job.ranks[group.name], self.seed)

    @stage("solving")
    def _factors_of(
        self, job: Job, groups: Sequence[Group], errors: Mapping[str, Tensor], moments: Mapping[str, Moments]
    ) -> list[GroupFactors]:
        dtype, solved = factor_dtype(self.model), []
        for group in groups:
            found = moments[group.name]
            if job.method.two_sided:
                found = replace(found, output=self._output_moment(group))
            solved.extend(self._factors(job, group, errors[group.name], found, dtype))
        return solved

    def _factors(
        self, job: Job, group: Group, error: Tensor, moments: Moments, dtype: torch.dtype
    ) -> list[GroupFactors]:
        parts = [(group, error, moments)] if job.method.shared else list(_members(group, error, moments))
        solved = []
        for part, part_error, part_moments in parts:
            rank = min(job.ranks[group.name], part_error.shape[0], part_error.shape[1])
            result = job.method.solve(part_error, part_moments, rank, self.seed)
            lefts = result.left.to(dtype).cpu().split(list(part.out_features))
            solved.append(
                GroupFactors(
                    part,
                    result.right.to(dtype).cpu(),
                    {member: left.contiguous() for member, left in zip(part.members, lefts, strict=True)},
                    result.gains.cpu(),
                    result.total,
                )
            )
        return solved


def _members(group: Group, error: Tensor, moments: Moments) -> Any:
    """Each member as a group of its own, for methods with one right factor per module."""
    start = 0
    for name, width in zip(group.members, group.out_features, strict=True):
        single = Group(name, (name,), group.in_features, (width,), group.block)
        yield single, error[start : start + width], moments.rows(start, start + width)
        start += width


def stops_of(trace: Trace, names: Container[str]) -> dict[str, list[Group]]:
    """Block at whose end the walk pauses -> the block's groups among `names`, in the order of the calls.

    The block "" stands for the whole model.
    """
    groups = [group for group in trace.groups if group.name in names]
    if not trace.in_order:
        # A block that runs again in the same forward would be corrected before all its inputs are measured, and at one
        # that never runs nothing pauses. So measure all groups before any of them is corrected.
        return {"": groups}
    stops: dict[str, list[Group]] = {}
    for group in groups:
        stops.setdefault(group.block, []).append(group)
    return stops


def _batch_size(sequences: Samples) -> int:
    """Sequences in a batch: few enough for two batches, whose moments can be compared."""
    return max(1, min(_BATCH_TOKENS // sequences.shape[1], len(sequences) // 2))
