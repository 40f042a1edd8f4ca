"""`BlockSolver`: computes the factors of each block from its weight errors and input moments."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.block_walk import BlockWalk
from ..calibration.input_moments import MomentCollector
from ..data.tokens import batches
from ..factors.factors import GroupFactors
from ..factors.group import Group
from ..models.forward import to_model
from ..models.reference import Reference
from ..models.tracing import Trace
from ..models.weight_errors import WeightErrors
from ..quantizers.base import Backend
from ..runtime.attach import attach, factor_dtype
from ..solving.methods.base import Method
from ..solving.moments import Moments, OutputMoment
from ..utils.logging import progress
from ..utils.timeline import stage
from .block_store import Resume

__all__ = ["BlockSolver", "stops_of"]

_BATCH_TOKENS = 4096


class BlockSolver:
    """Solves a model's groups block by block. Each block's correction is attached before the next block is measured.

    Args:
        model: quantized model; corrected in place.
        reference: full-precision weights.
        backends: module name -> backend of every quantized module.
        method: computes factors from a group's weight error and moments.
        ranks: group name -> rank.
        seed: seed of the solver.
        resume: stores finished blocks.
        outputs: group name -> second moment of the loss gradient at the group's outputs, if the method uses it.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: Reference,
        backends: Mapping[str, Backend],
        method: Method,
        ranks: Mapping[str, int],
        seed: int,
        resume: Resume,
        outputs: Mapping[str, OutputMoment],
    ) -> None:
        self.model = model
        self.weight_errors = WeightErrors(model, reference, backends)
        self.method = method
        self.ranks = ranks
        self.seed = seed
        self.resume = resume
        self.outputs = outputs

    @stage("blocks")
    def solve(self, stops: Mapping[str, Sequence[Group]], sequences: Tensor) -> list[GroupFactors]:
        """Solve every group.

        Args:
            stops: what `stops_of` returned.
            sequences: token ids of the calibration text, shape (n, length), int64.

        Returns:
            The factors of every group, in the order of `stops`. They are attached to the model.
        """
        solved: list[GroupFactors] = []
        inputs = [to_model(batch, self.model) for batch in batches(sequences, _batch_size(sequences))]
        work = len(inputs) * len(stops) if self.method.statistic != "none" else len(stops)
        bar = progress(total=work, desc="Correcting", unit="block")
        with bar, BlockWalk(self.model, inputs, list(stops)) as walk:
            for stop, members in stops.items():
                done = self.resume.load(stop, members)
                if done is None:
                    done = self._solve_block(walk, stop, members, bar)
                    self.resume.save(stop, done)
                else:
                    bar.update(len(inputs))
                for entry in done:
                    attach(self.model, entry)
                solved.extend(done)
        return solved

    def _solve_block(self, walk: BlockWalk, stop: str, groups: Sequence[Group], bar: Any) -> list[GroupFactors]:
        errors = self.weight_errors.errors(groups)
        moments = dict.fromkeys(errors, Moments(tokens=0))
        if self.method.statistic == "none":
            bar.update()
        else:
            collectors = [self._collector(group, errors[group.name]) for group in groups]
            for _ in walk.collect(stop, collectors):
                bar.update()
            moments = {collector.group.name: self._moments(collector) for collector in collectors}
        solved: list[GroupFactors] = []
        for group in groups:
            solved.extend(self._factors(group, errors[group.name], moments[group.name], factor_dtype(self.model)))
        return solved

    def _moments(self, collector: MomentCollector) -> Moments:
        return replace(collector.moments(), output=self.outputs.get(collector.group.name))

    def _collector(self, group: Group, error: Tensor) -> MomentCollector:
        narrow = sum(group.out_features) < group.in_features  # E S E^T, shape (O, O), is then smaller than S, (d, d)
        return MomentCollector(group, self.method.statistic, error if narrow else None)

    @stage("solving")
    def _factors(self, group: Group, error: Tensor, moments: Moments, dtype: torch.dtype) -> list[GroupFactors]:
        parts = [(group, error, moments)] if self.method.shared else list(_members(group, error, moments))
        solved = []
        for part, part_error, part_moments in parts:
            rank = min(self.ranks[group.name], part_error.shape[0], part_error.shape[1])
            result = self.method.solve(part_error, part_moments, rank, self.seed)
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
    if trace.repeated:
        # A block that runs again in the same forward would be corrected before all its inputs are measured. So measure
        # all groups before any of them is corrected.
        return {"": groups}
    stops: dict[str, list[Group]] = {}
    for group in groups:
        stops.setdefault(group.block, []).append(group)
    return stops


def _batch_size(sequences: Tensor) -> int:
    return max(1, _BATCH_TOKENS // sequences.shape[1])
