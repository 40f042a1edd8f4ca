"""`correct()`: quantized model -> groups -> moments -> factors -> correction, block by block."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from ..artifact.build import stored_config
from ..artifact.correction import Correction
from ..artifact.coverage import coverage_of
from ..artifact.request import CorrectionRequest
from ..calibration.text_gap import lost_to_sampling
from ..data.inputs import Samples
from ..errors import ConfigError, NoImprovementError, SensitivityError, UnsupportedModuleError
from ..evaluation.change import answer_change
from ..evaluation.figures import is_worse, not_better
from ..evaluation.improvement import improvement
from ..factors.factors import GroupFactors
from ..factors.form import FactorForm, bits_of
from ..factors.group import Group
from ..factors.units import GainUnit
from ..models.wrappers import correctable
from ..quantizers.model import packed_bytes
from ..runtime.attach import applied, attach, attached, detach
from ..runtime.attach import factor_dtype as dtype_of_factors
from ..selection.ranks import candidate_ranks, uniform_ranks
from ..solving.methods.base import get_method
from .block_solver import Job
from .block_store import Resume, open_blocks, run_key
from .finish import finished
from .prepared import opened, readable_modules, traced
from .problem import Problem
from .sequences import TOKENS_PER_RANK, calibration_sequences, check_token_count, split_sequences

__all__ = ["correct"]

_MUCH = 0.02  # share of the quantized model's loss

_logger = logging.getLogger(__name__)


def correct(
    model: nn.Module,
    *,
    reference: Any,
    tokenizer: Any = None,
    resume: str | os.PathLike[str] | None = None,
    dense: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    request: CorrectionRequest | None = None,
    **options: Any,
) -> Correction:
    """Correct a quantized model with low-rank factors, and return the factors as a `Correction`.

    The model itself is corrected in place: afterwards it computes y = Q x + A (B x), and its own `save_pretrained`
    writes the self-contained form. `glowq.detach` removes the correction.

    Args:
        model: quantized transformers model. A compiled model runs uncompiled until it is corrected.
        reference: the full-precision model that it was made from: a folder, a Hub name ("org/model" or
            "org/model@revision"), or a model in memory.
        tokenizer: turns the text into ids; needed only if `calibration` is text.
        resume: folder for finished blocks, so that an interrupted run continues where it stopped. It is created if
            missing, and must hold nothing else. One run at a time uses it.
        dense: correct plain float weights that hold quantized values: those of a GGUF, float8 or mxfp4 file that was
            dequantized on load, or fake-quantized ones. Every linear layer except the head is corrected.
        revision: branch, tag or commit that `model` was loaded from, if it was not the Hub's main branch. transformers
            does not record it, and the correction must name it.
        subfolder, variant: what `from_pretrained` was told of them when it loaded `model`, for the same reason.
        request: the settings of the correction. They can also be given one by one as `options`.
        **options: fields of `CorrectionRequest`: rank, budget, rank_step, max_rank, method, calibration,
            calibration_tokens, sequence_length, distill, factor_dtype, seed, force.

    Returns:
        The correction, which is attached to `model`. Its factors have the model's dtype and are on the CPU.

    Raises:
        BackendError: transformers could not read the weights of the model's checkpoint.
        UnsupportedModuleError: the model holds no quantized linear module, or none that can be corrected, or their
            weights are the reference's; or it is not a model, carries a PEFT adapter, or is inside of another module.
        ReferenceMismatchError: modules, shapes or embeddings of the reference differ from those of the model.
        FoldingError: a quantized weight was multiplied by channel scales, and no layer before it divides by them.
        CalibrationError: no text, or fewer tokens than needed. A budget needs 2 sequences, because the groups are
            measured on one of them. Rounded factors need 2 sequences, too, because they are measured on one.
        RankError: rank below 1, or larger than every group allows.
        ConfigError: an option is unknown or wrong; the budget is too small for any rank; or the budget is a target
            ("recover 80%") that the solved ranks cannot reach. For a target, as many ranks are solved as for a budget
            of 10%.
        NoImprovementError: on text that was held out, the correction makes the model's answers worse beyond chance.
        OutputError: another run uses the folder `resume`, it holds something else, or it cannot be written.
        RoundingError: rounded factors would lose more accuracy than the saved bytes can give back.
        NonFiniteError: NaN or Inf in a weight or in an activation; the message names the module.
    """
    model = correctable(model)
    request = CorrectionRequest.of(request, options).of_quantized_model()
    solver, ranks_asked, seed = get_method(request.method), request.ranks, request.seed
    if attached(model):
        raise ConfigError("the model carries a correction already; call glowq.detach(model) first.")
    backends = readable_modules(model, dense)
    sequences = calibration_sequences(model, request, tokenizer)
    trace = traced(model, sequences)
    base_bytes = packed_bytes(model)
    train, held = split_sequences(sequences, solver, ranks_asked, request.factor_dtypes[-1], seed)
    ranks = _solved_ranks(trace.groups, request, base_bytes, dtype_of_factors(model).itemsize, train)
    config = stored_config(model, reference, base_bytes, solver.name, sequences, seed, revision, subfolder, variant)
    config.record(coverage=coverage_of(model, trace))
    try:
        with (
            nullcontext() if resume is None else open_blocks(resume) as blocks,
            opened(reference, model, trace, sequences, dense=dense, variant=variant) as source,
        ):
            key = "" if blocks is None else run_key(config, source.identity(), ranks, dtype_of_factors(model), train)
            problem = Problem(model, source, backends, trace, train, held, base_bytes, seed)
            (factors,) = problem.solve([Job(solver, ranks, Resume(blocks, key))])
            if request.budget is None:  # a budget is refused where nothing gains
                _refuse_without_error(factors)
            correction = finished(problem, solver, factors, request, config, tokenizer)
            _report_text_gap(problem, correction)
            if held is not None:
                found = _improvement(model, source.model, correction.factors, held)
                correction.config.record(improvement=found)
                if found is not None and is_worse(found) and not request.force:
                    raise NoImprovementError(f"the correction makes the model worse: {not_better(found)}")
            with applied(model, correction.factors):
                correction.config.record(change=answer_change(model))
    finally:
        detach(model)
    for entry in correction.factors:
        attach(model, entry)
    return correction


def _solved_ranks(
    groups: Sequence[Group], request: CorrectionRequest, base_bytes: int, itemsize: int, train: Samples
) -> dict[str, int]:
    """Group name -> rank to solve for.

    If the form of the factors is chosen later, this is the rank of the first form, whose ranks take the fewest bytes,
    or fewer where the text has too few tokens for them. The text must be enough for the last form.
    """
    if request.budget is None:
        ranks = uniform_ranks(groups, request.rank)
        check_token_count(train, ranks)
        return ranks
    shared = get_method(request.method).shared
    first, last = (
        candidate_ranks(groups, request.ranks, base_bytes, FactorForm(bits_of(name), itemsize), shared=shared)
        for name in (request.factor_dtypes[0], request.factor_dtypes[-1])
    )
    check_token_count(train, last)
    most = train.numel() // TOKENS_PER_RANK // request.rank_step * request.rank_step
    ranks = {name: max(last.get(name, 0), min(rank, most)) for name, rank in first.items()}
    return {name: rank for name, rank in ranks.items() if rank}


def _refuse_without_error(factors: Sequence[GroupFactors]) -> None:
    if not any(entry.total > 0 for entry in factors):
        raise UnsupportedModuleError(
            f"the weights of all {len(factors)} groups equal the reference's: there is no error to correct. If the "
            "model was quantized, its quantized values are elsewhere: in the experts of a mixture, which are not "
            "linear modules, or in the embeddings. Or the reference itself holds the quantized values."
        )


def _report_text_gap(problem: Problem, correction: Correction) -> None:
    """Say how much longer text would help, if it would help much."""
    found, predicted = lost_to_sampling(problem.gaps, correction.ranks), correction.predicted
    counts_loss = correction.config.provenance.gains != GainUnit.SQUARED_OUTPUT
    if found is None or predicted is None or not counts_loss or predicted * found[0] < _MUCH:
        return
    _logger.warning(
        "longer calibration text is expected to undo about %.0f%% more of what quantization changed: factors that are "
        "solved with one half of these %s tokens keep %.0f%% of their gain on the other half.",
        100 * predicted * found[0],
        f"{problem.train.numel():,}",
        100 * found[1],
    )


def _improvement(
    model: nn.Module, reference: nn.Module, factors: Sequence[GroupFactors], sequences: Samples
) -> dict[str, Any] | None:
    """See `improvement`; None for a model whose outputs cannot be compared, such as one with a classification head."""
    try:
        return improvement(model, reference, factors, sequences)
    except SensitivityError:
        return None
