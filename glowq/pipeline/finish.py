"""From solved factors to a correction: measure each group, choose ranks, round, and distill."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from ..artifact.build import correction_of
from ..artifact.config import GlowQConfig
from ..artifact.correction import Correction
from ..artifact.request import CorrectionRequest
from ..calibration.distillation import distill
from ..calibration.group_gains import calibrated, measure_groups
from ..data.inputs import Samples
from ..errors import NoGainError, RoundingError
from ..evaluation.rounding_cost import rounding_cost
from ..factors.factors import GroupFactors
from ..factors.form import bits_of
from ..factors.rounding import round_group
from ..factors.units import GainUnit
from ..selection.allocation import allocate, by_benefit
from ..selection.budget import RankRequest, parse_target
from ..solving.methods.base import Method
from .more_bits import predict_more_bits
from .problem import Problem

__all__ = ["finished"]

_logger = logging.getLogger(__name__)


def finished(
    problem: Problem,
    method: Method,
    factors: list[GroupFactors],
    request: CorrectionRequest,
    config: GlowQConfig,
    tokenizer: Any,
) -> Correction:
    """Make a correction of the factors that a method solved.

    Args:
        problem: see `Problem`. Its model has no correction afterwards.
        method: the method.
        factors: what `Problem.solve` returned for it.
        request: ranks or budget, distillation, and the dtype of the factors.
        config: what config.json will store; the facts of this correction are recorded in it.
        tokenizer: tokenizer of the model, for the correction.

    Raises:
        NoGainError: a budget is requested, and no rank of any group gains anything.
        RoundingError: rounded factors would lose more accuracy than the saved bytes can give back.
        ConfigError: a target ("recover 80%") that the factors cannot reach.
    """
    model, reference, held = problem.model, problem.source.model, problem.held
    config.record(gains=problem.unit if method.two_sided else GainUnit.SQUARED_OUTPUT)
    if held is not None and method.allocation == "gain":
        factors, facts = _measured(model, reference, factors, held, request.ranks)
        config.record(**facts)
    if config.provenance.total is None:
        # The total also covers groups that are not restored, so record it before they are removed.
        config.record(total=math.fsum(entry.total for entry in factors))
    lacking = problem.source.missing
    whole = correction_of(model, factors, config, problem.base_bytes, tokenizer, lacking=lacking)
    if request.budget is not None:
        _check_gains(factors, problem.train)
    correction = _chosen(problem, whole, request)
    if request.budget is not None and correction.config.provenance.gains != GainUnit.SQUARED_OUTPUT:
        correction.config.record(
            instead=predict_more_bits(model, factors, correction.factor_bytes, correction.config.total)
        )
    return correction


def _chosen(problem: Problem, whole: Correction, request: CorrectionRequest) -> Correction:
    """The ranks that a request chooses of all that were solved, in the first form that loses too little by rounding."""
    *first, last = request.factor_dtypes
    for factor_dtype in first:
        try:
            return _stored_as(problem, whole, request, factor_dtype)
        except RoundingError as error:
            _logger.warning("the factors are stored in the model's own dtype: %s", error)
    return _stored_as(problem, whole, request, last)


def _stored_as(problem: Problem, whole: Correction, request: CorrectionRequest, factor_dtype: str) -> Correction:
    """The ranks that a request chooses of all that were solved: rounded, and distilled if the request says so."""
    model, reference, bits = problem.model, problem.source.model, bits_of(factor_dtype)
    correction = whole if request.budget is None else whole.kept(_ranks(whole, request, factor_dtype))
    unrounded = correction.factors
    if bits is not None:
        correction = correction.rounded(factor_dtype)
    if request.distill:
        correction.factors, taken = distill(
            model, reference, unrounded, problem.train, steps=request.distill, bits=bits, seed=problem.seed
        )
        correction.config.record(distilled_steps=taken or None)
    if bits is not None:
        assert problem.held is not None
        cost = rounding_cost(model, reference, correction.factors, unrounded, _within(whole, correction), problem.held)
        correction.config.record(rounding=cost)
    return correction


def _ranks(whole: Correction, request: CorrectionRequest, factor_dtype: str) -> dict[str, int]:
    """The ranks within a budget of bytes; or for a target, those whose factors reach it as they will be stored."""
    bits = bits_of(factor_dtype)
    if bits is None or parse_target(request.budget or "") is None:
        return whole.choose(request.ranks, factor_dtype)
    return replace(whole, factors=[round_group(entry, bits) for entry in whole.factors]).choose(request.ranks)


def _measured(
    model: nn.Module,
    reference: nn.Module,
    factors: Sequence[GroupFactors],
    sequences: Samples,
    request: RankRequest,
) -> tuple[list[GroupFactors], dict[str, Any]]:
    """Measure each group, and return the factors with rescaled gains, and facts for the provenance.

    The gains are in the unit of the measurement. If a budget is given, the gains of groups that make the answers worse
    are set to zero.
    """
    measured = measure_groups(model, reference, factors, sequences)
    found = calibrated(factors, measured)
    harmful = {name for name, entry in measured.items() if request.budget is not None and entry.harms}
    first = next(iter(measured.values()))
    facts = {
        "gains": first.unit,
        "total": max(0.0, first.before),  # rounding can make a divergence of zero negative
        "measured_tokens": int(sequences.numel()),
        "not_restored": {name: asdict(measured[name].interval) for name in sorted(harmful)},
    }
    return [replace(entry, gains=0 * entry.gains) if entry.group.name in harmful else entry for entry in found], facts


def _within(whole: Correction, correction: Correction) -> list[GroupFactors]:
    """The unrounded ranks that gain most in the bytes of a correction."""
    steps = allocate(by_benefit(whole.group_gains), correction.factor_bytes)
    return whole.kept({step.name: step.rank for step in steps}).factors


def _check_gains(factors: Sequence[GroupFactors], sequences: Samples) -> None:
    if not any(bool((entry.gains > 0).any()) for entry in factors):
        raise NoGainError(
            "in the measurement, no rank of any group brings the model's answers nearer to the reference's, so that a "
            "budget has no use. The factors were calibrated on "
            f"{sequences.numel():,} tokens: calibrate on more, or on text that is more similar to the model's task; or "
            "leave the model uncorrected."
        )
