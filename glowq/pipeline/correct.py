"""`correct()`: quantized model -> groups -> moments -> factors -> correction, block by block."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from ..artifact.build import correction_of, stored_config
from ..artifact.correction import Correction
from ..artifact.request import CorrectionRequest
from ..calibration.distillation import distill as distill_factors
from ..calibration.group_gains import calibrated, measure_groups
from ..calibration.output_gradients import output_moments
from ..data.tokens import batches
from ..errors import (
    ConfigError,
    NoGainError,
    NoGradientWarning,
    NoImprovementError,
    SensitivityError,
    UnsupportedModuleError,
)
from ..evaluation.change import answer_change
from ..evaluation.improvement import improvement, is_worse, not_better
from ..evaluation.rounding_cost import rounding_cost
from ..factors.factors import GroupFactors
from ..factors.units import GainUnit
from ..models.forward import refuse_encoder_decoder, to_model
from ..models.reference import REVISION_TOLERANCE, Reference
from ..models.tracing import Trace, trace_groups
from ..models.wrappers import correctable, uncompiled
from ..quantizers.libraries.dense import adopt_dense, dequantized_from
from ..quantizers.model import check_scales, packed_bytes, prepare_model, refuse_misloaded
from ..quantizers.registry import methods
from ..runtime.attach import applied, attach, attached, detach
from ..runtime.attach import factor_dtype as dtype_of_factors
from ..selection.allocation import allocate, by_benefit
from ..selection.budget import RankRequest
from ..selection.ranks import candidate_ranks, uniform_ranks
from ..solving.methods.base import get_method
from ..solving.moments import OutputMoment
from ..solving.shrinkage import effective_tokens, shrunk
from .block_solver import BlockSolver, stops_of
from .block_store import Resume, open_blocks, run_key
from .sequences import calibration_sequences, check_token_count, split_sequences

__all__ = ["correct"]

_TRACE_TOKENS = 8
_GRADIENT_TOKENS = 8192
_GRADIENT_BATCH = 512  # tokens per backward pass, which keeps the activations of all its tokens
_DENSE_TOLERANCE = 0.5  # GGUF also quantizes the embeddings: 4 bits change them by 0.1; another model differs by 1.4


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
        tokenizer: turns the text into ids; needed unless `calibration` holds token ids.
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
        UnsupportedModuleError: the model holds no quantized linear module, or none that can be corrected; or it is not
            a model, carries a PEFT adapter, or is inside of another module.
        ReferenceMismatchError: modules, shapes or embeddings of the reference differ from those of the model.
        FoldingError: a quantized weight was multiplied by channel scales, and no layer before it divides by them.
        CalibrationError: no text, or fewer tokens than needed. A budget needs 2 sequences, because the groups are
            measured on one of them. int8 factors need 2 sequences, too, because they are measured on one.
        RankError: rank below 1, or larger than every group allows.
        ConfigError: an option is unknown or wrong; the budget is too small for any rank; or the budget is a target
            ("recover 80%") that the solved ranks cannot reach. For a target, as many ranks are solved as for a budget
            of 10%.
        NoImprovementError: on text that was held out, the correction makes the model's answers worse beyond chance.
        OutputError: another run uses the folder `resume`, it holds something else, or it cannot be written.
        RoundingError: int8 factors would lose more accuracy than the saved bytes can give back.
        NonFiniteError: NaN or Inf in a weight or in an activation; the message names the module.
    """
    model = correctable(model)
    request = CorrectionRequest.of(request, options).of_quantized_model()
    solver, ranks_asked, seed = get_method(request.method), request.ranks, request.seed
    int8 = request.factor_dtype == "int8"
    if attached(model):
        raise ConfigError("the model carries a correction already; call glowq.detach(model) first.")
    refuse_misloaded(model)
    if dense:
        adopt_dense(model)
    backends = prepare_model(model)
    if not backends:
        raise UnsupportedModuleError(_nothing_quantized(model))
    check_scales(model)
    sequences = calibration_sequences(model, request, tokenizer)
    trace = _trace(model, sequences)
    base_bytes = packed_bytes(model)
    if request.budget is None:
        ranks = uniform_ranks(trace.groups, request.rank)
    else:
        itemsize = 1 if int8 else dtype_of_factors(model).itemsize
        ranks = candidate_ranks(trace.groups, ranks_asked, base_bytes, itemsize, shared=solver.shared)
    train, held = split_sequences(sequences, solver, ranks_asked, int8, seed)
    check_token_count(train, ranks)
    config = stored_config(model, reference, base_bytes, solver.name, sequences, seed, revision, subfolder, variant)
    try:
        with (
            uncompiled(),
            nullcontext() if resume is None else open_blocks(resume) as blocks,
            Reference(reference, type(model), getattr(model, "device", None), fresh=model, variant=variant) as source,
        ):
            source.check({name: shape for group in trace.groups for name, shape in group.shapes.items()})
            source.check_ids(sequences)
            source.check_revision(model, _DENSE_TOLERANCE if dense else REVISION_TOLERANCE)
            key = "" if blocks is None else run_key(config, source.identity(), ranks, dtype_of_factors(model), train)
            store = Resume(blocks, key)
            outputs = _output_moments(model, source.model, trace, train, seed) if solver.two_sided else {}
            config.record(gains=GainUnit.SECOND_ORDER if outputs else GainUnit.SQUARED_OUTPUT)
            run = BlockSolver(model, source, backends, solver, ranks, seed, store, outputs)
            factors = run.solve(stops_of(trace, ranks), train)
            detach(model)
            if held is not None and solver.allocation == "gain":
                factors, facts = _measured(model, source.model, factors, held, ranks_asked)
                config.record(**facts)
            # The total also covers groups that are not restored, so record it before they are removed.
            config.record(total=math.fsum(entry.total for entry in factors))
            whole = correction_of(model, factors, config, base_bytes, tokenizer, lacking=source.missing)
            correction = whole
            if request.budget is not None:
                _check_gains(factors, train)
                correction = whole.kept(whole.choose(ranks_asked, request.factor_dtype))
            if request.distill:
                steps = {"steps": request.distill, "seed": seed}
                correction.factors = distill_factors(model, source.model, correction.factors, train, **steps)
                correction.config.record(distilled_steps=request.distill)
            if int8:
                assert held is not None
                correction = _rounded(model, source.model, whole, correction, held)
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


def _improvement(
    model: nn.Module, reference: nn.Module, factors: Sequence[GroupFactors], sequences: Tensor
) -> dict[str, Any] | None:
    """See `improvement`; None for a model whose outputs cannot be compared, such as one with a classification head."""
    try:
        return improvement(model, reference, factors, sequences)
    except SensitivityError:
        return None


def _check_gains(factors: Sequence[GroupFactors], sequences: Tensor) -> None:
    if not any(bool((entry.gains > 0).any()) for entry in factors):
        raise NoGainError(
            "in the measurement, no rank of any group brings the model's answers nearer to the reference's, so that a "
            "budget has no use. The factors were calibrated on "
            f"{sequences.numel():,} tokens: calibrate on more, or on text that is more similar to the model's task; or "
            "leave the model uncorrected."
        )


def _rounded(
    model: nn.Module, reference: nn.Module, whole: Correction, correction: Correction, sequences: Tensor
) -> Correction:
    """The correction with int8 factors. Its config records the loss of accuracy by rounding.

    For this record, the int8 factors are compared with the unrounded ones, and with the best ranks of `whole` that fit
    in the same bytes.
    """
    found = correction.to_int8()
    steps = allocate(by_benefit(whole.group_gains), found.factor_bytes)
    same_bytes = whole.kept({step.name: step.rank for step in steps})
    cost = rounding_cost(model, reference, found.factors, correction.factors, same_bytes.factors, sequences)
    found.config.record(int8=cost)
    return found


def _measured(
    model: nn.Module,
    reference: nn.Module,
    factors: Sequence[GroupFactors],
    sequences: Tensor,
    request: RankRequest,
) -> tuple[list[GroupFactors], dict[str, Any]]:
    """Measure each group, and return the factors with rescaled gains, and facts for the provenance.

    The gains are in the unit of the measurement. If a budget is given, the gains of groups that make the answers worse
    are set to zero.
    """
    measured = measure_groups(model, reference, factors, sequences)
    found = calibrated(factors, measured)
    harmful = {name for name, entry in measured.items() if request.budget is not None and entry.harms}
    facts = {
        "gains": next(iter(measured.values())).unit,
        "measured_tokens": int(sequences.numel()),
        "not_restored": {name: asdict(measured[name].benefit) for name in sorted(harmful)},
    }
    return [replace(entry, gains=0 * entry.gains) if entry.group.name in harmful else entry for entry in found], facts


def _output_moments(
    model: nn.Module, reference: nn.Module, trace: Trace, sequences: Tensor, seed: int
) -> dict[str, OutputMoment]:
    """Second moment of the loss gradient at each group's outputs: of the model, or of the reference if that fails.

    The moments are shrunk as far as the number of tokens, and of distinct tokens, asks for.

    If neither model has a gradient, the result is empty, and one warning is shown.
    """
    chosen = sequences[: max(1, _GRADIENT_TOKENS // sequences.shape[1])]
    inputs = [to_model(batch, model) for batch in batches(chosen, max(1, _GRADIENT_BATCH // sequences.shape[1]))]
    refusals = []
    for candidate in (model, reference):
        try:
            moments = output_moments(candidate, trace.groups, inputs, seed=seed)
        except SensitivityError as error:
            refusals.append(error)
            continue
        for name, moment in moments.items():
            moments[name] = shrunk(moment, effective_tokens(chosen))
        return moments
    warnings.warn(
        f"{refusals[0]} Errors are counted in output units instead of in loss, so a budget is allocated less well.",
        NoGradientWarning,
        stacklevel=3,
    )
    return {}


def _nothing_quantized(model: nn.Module) -> str:
    found, method = f"{type(model).__name__} holds no quantized linear module", dequantized_from(model)
    if method is None:
        return (
            f"{found}: there is nothing to correct. Quantize it first, for example with GlowQConfig(base='nf4'); if "
            "its float weights hold quantized values, pass dense=True (--base dense) to correct them as they are."
        )
    if method in methods() and getattr(model.config, "quantization_config", None) is not None:
        return (
            f"{found}: its config names {method}, which left every linear layer as it is (its list of modules to skip, "
            "llm_int8_skip_modules or modules_to_not_convert, may name all). Quantize some, or pass dense=True (--base "
            "dense) if its float weights hold quantized values."
        )
    return (
        f"{found}: its {method} weights were dequantized on load. Pass dense=True (--base dense) to correct the "
        "dequantized weights as they are, or load the model with a quantizer that keeps them packed."
    )


def _trace(model: nn.Module, sequences: Tensor) -> Trace:
    example = to_model({"input_ids": sequences[:1, :_TRACE_TOKENS]}, model)
    try:
        trace = trace_groups(model, example)
    except ValueError:
        # BART and similar models create the decoder's input themselves. T5 does not, and fails in the forward.
        refuse_encoder_decoder(model)
        raise
    if not trace.groups:
        name, reason = next(iter(trace.skipped.items()))
        raise UnsupportedModuleError(f"no module can be corrected; {name}: {reason}.")
    return trace
