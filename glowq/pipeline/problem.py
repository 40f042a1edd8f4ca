"""`Problem`: what the corrections of one quantized model share. Several are solved in one pass over the text."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from ..calibration.output_gradients import output_moments
from ..calibration.text_gap import TextGap
from ..data.inputs import Inputs, Samples, batches
from ..errors import NoGradientWarning, SensitivityError
from ..factors.factors import GroupFactors
from ..factors.units import GainUnit
from ..models.forward import to_model
from ..models.reference import Reference
from ..models.tracing import Trace
from ..quantizers.base import Backend
from ..solving.moments import OutputMoment
from ..solving.shrinkage import effective_tokens, shrunk
from ..utils.names import some_of
from .block_solver import BlockSolver, Job, stops_of

__all__ = ["Problem"]

_logger = logging.getLogger(__name__)

_GRADIENT_TOKENS = 8192
_KEPT_BYTES = 2**30
_GRADIENT_BATCH = 512  # tokens per backward pass, which keeps the activations of all its tokens


@dataclass
class Problem:
    """A quantized model, its reference, and the text that its corrections are made of.

    Attributes:
        model: quantized model without a correction.
        source: the opened reference.
        backends: module name -> backend of every quantized module.
        trace: the groups of the model.
        train: token ids to calibrate on, shape (n, length), int64, or samples of another kind.
        held: those to measure on; None if there are too few.
        base_bytes: bytes of the quantized weights.
        seed: seed of the gradients and of the solver.
        unit: unit of the gains of the factors that `solve` returned last for a method that reads gradients.
        gaps: what some of these factors gain on other text, see `BlockSolver`.
    """

    model: nn.Module
    source: Reference
    backends: Mapping[str, Backend]
    trace: Trace
    train: Samples
    held: Samples | None
    base_bytes: int
    seed: int
    unit: GainUnit = GainUnit.SQUARED_OUTPUT
    gaps: Mapping[str, TextGap] = field(default_factory=dict)

    def solve(self, jobs: Sequence[Job]) -> list[list[GroupFactors]]:
        """Solve corrections in one pass; returns the factors of each, in the order of the model's calls.

        Args:
            jobs: the corrections, at least one.
        """
        outputs = self._output_moments() if any(job.method.two_sided for job in jobs) else {}
        self.unit = GainUnit.SECOND_ORDER if outputs else GainUnit.SQUARED_OUTPUT
        jobs = [_used(job, outputs) for job in jobs]
        names = {name for job in jobs for name in job.ranks}
        run = BlockSolver(self.model, self.source, self.backends, jobs, self.seed, outputs)
        solved = run.solve(stops_of(self.trace, names), self.train)
        self.gaps = run.gaps
        return solved

    def _output_moments(self) -> dict[str, OutputMoment]:
        """Second moment of the loss gradient at each group's outputs: of the reference, or of the model if that fails.

        The reference's gradient tells what a small error of an output costs. That of a model which quantization has
        destroyed does not; where both models are near each other, they are alike. The moments are shrunk as far as the
        number of tokens, and of distinct tokens, asks for.

        If the reference has no gradient, the result is empty, and one warning is shown.
        """
        reference, length = self.source.model, self.train.shape[1]
        count = min(len(self.train), max(1, _GRADIENT_TOKENS // length))
        # From all parts of the text: token ids that a user joined may be prose first, and then code.
        chosen = self.train[[(2 * number + 1) * len(self.train) // (2 * count) for number in range(count)]]
        inputs = [to_model(batch, reference) for batch in batches(chosen, max(1, _GRADIENT_BATCH // length))]
        again = True if _is_mapped(reference) else None
        try:
            moments = output_moments(reference, self.trace.groups, inputs, checkpoint=again, seed=self.seed)
        except SensitivityError as error:
            warnings.warn(
                f"{error} Errors are counted in output units instead of in loss, so a budget is allocated less well.",
                NoGradientWarning,
                stacklevel=4,
            )
            return {}
        tokens = float(chosen.numel()) if isinstance(chosen, Inputs) else effective_tokens(chosen)
        return {name: shrunk(moment, tokens) for name, moment in moments.items()}


def _used(job: Job, outputs: Mapping[str, OutputMoment]) -> Job:
    """A correction without the groups whose outputs do not matter on this text, if that is known."""
    if not outputs or not job.method.two_sided:
        return job
    unused = sorted(set(job.ranks) - set(outputs))
    if unused:
        _logger.warning("on this text the model does not use the outputs of %s: left out.", some_of(unused))
    return replace(job, ranks={name: rank for name, rank in job.ranks.items() if name in outputs})


def _is_mapped(model: nn.Module) -> bool:
    """Whether a model has more than 1 GiB of weights that are not in memory, where a backward pass would keep them."""
    return sum(weight.nbytes for weight in model.parameters() if weight.is_meta) > _KEPT_BYTES
