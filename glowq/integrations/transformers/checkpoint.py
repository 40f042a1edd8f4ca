"""All steps from a model's name to a saved correction, as `glowq correct` and optimum's exporter run them."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...artifact.correction import Correction
from ...artifact.coverage import covered
from ...artifact.request import CorrectionRequest
from ...data.inputs import Inputs
from ...data.media import read_media
from ...errors import NoImprovementError
from ...evaluation.figures import is_better, not_better
from ...evaluation.held_out import held_out_figures, parted_sequences, reference_score
from ...models.fast_products import slow_here
from ...models.loading import load_config, load_model, main_input, reference_name, scores_text
from ...models.preprocessors import load_processor, load_tokenizer
from ...pipeline.block_store import check_blocks, remove_blocks
from ...pipeline.mixed import check_mixable, plan_mixture
from ...pipeline.sequences import unmeasured
from ...quantizers.registry import base_config, with_calibration
from ...utils.names import split_revision
from ...utils.output import check_output, output_path, write_directory
from ...utils.timeline import stage
from .memory import correct

__all__ = ["correct_checkpoint"]


def correct_checkpoint(
    model: str,
    output: str | os.PathLike[str],
    *,
    request: CorrectionRequest,
    base: str = "none",
    reference: str | None = None,
    format: str | None = None,
    gguf_file: str | None = None,
    auto_class: Any = None,
    resume: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Quantize a model if asked to, correct it, measure it on held-out text, and save it.

    The output folder is written completely or not at all.

    Args:
        model: folder or Hub name ("org/model" or "org/model@revision").
        output: folder to write; must be new, empty, or an earlier result.
        request: how to correct the model. An eighth of its calibration text is held out for the measurement. A model
            that reads images or sounds takes those that the calibration names, see `glowq.data.media.read_media`.
        base: name of the quantizer, see `glowq.quantizers.registry.base_names`; "none" if the model is quantized
            already, "dense" if its float weights hold quantized values.
        reference: folder or Hub name of the full-precision model. None takes `model`, which must then hold the
            full-precision weights.
        format: "correction" (the factors, and the name of the base) or "full" (quantized weights and factors in one
            checkpoint). None takes "correction" if the base can be loaded by its name, otherwise "full".
        gguf_file: GGUF file in the folder `model`, for base "dense".
        auto_class: transformers class to load the model with; None takes the class that its config names.
        resume: store finished blocks in `<output>.resume` until the result is saved, and reuse the blocks of a run with
            the same settings that are already there. One run at a time uses the folder.
        command: the exact command line, for the model card.

    Returns:
        "output", "groups" (number of groups), "ranks" (group name -> rank), "factor_bytes", "base_bytes", "overhead"
        (`factor_bytes` as a share of `base_bytes`), "predicted" (share of the predicted loss that the factors remove,
        or None), "instead" (share that more bits are predicted to undo in the same bytes, see
        `glowq.pipeline.more_bits`, or None), "gains" (unit of that loss), "calibration_tokens", "factor_dtype",
        "distilled_steps" (None if the factors were not distilled), "rounding" (measured cost of rounding, see
        `glowq.evaluation.rounding_cost`; None if they are not rounded),
        "improvement" (measured divergences without and with the correction, see `glowq.evaluation.improvement`; None if
        no sequence could be held out), "held_out" (perplexities; None if the model does not predict the next token),
        "mixed" (the groups that got more bits, see `glowq.pipeline.mixed.Mixture`; None if none did), "coverage" (which
        weights are corrected, see `glowq.artifact.coverage`), "seed", and "slow_here" (a sentence if the model's layers
        are slow on this processor, or None).

    Raises:
        NoImprovementError: the correction is not better than none beyond chance, on text that it was not made of.
        GlowQError: see `glowq.correct`, `glowq.models.loading` and `glowq.utils.output.write_directory`.
    """
    target = output_path(output)
    kept = target.with_name(f"{target.name}.resume")
    check_output(target)
    if resume:
        check_blocks(kept)
    quantization = None if base in ("none", "dense") else base_config(base)
    if request.mixed:
        check_mixable(quantization)
    config = load_config(model, gguf_file)
    source = reference_name(model, config, base, reference)
    main = main_input(config, auto_class)
    train: Any
    held: Any = None
    if main == "input_ids":
        tokenizer = load_tokenizer(model, source)
        train, held = parted_sequences(
            config, tokenizer, request.calibration, request.calibration_tokens, request.sequence_length, request.seed
        )
        shown = unmeasured(train, request.seed)
    else:
        tokenizer = load_processor(main, model, source)
        train = partial(read_media, request.calibration, tokenizer, request.seed)
        shown = Inputs(())  # a base that is quantized with text refuses them
    score = reference_score(source, held) if main == "input_ids" and scores_text(config, auto_class) else None
    if quantization is not None:
        quantization = with_calibration(quantization, shown)
    load = partial(load_model, model, config, gguf_file=gguf_file, auto_class=auto_class)
    corrected, asked = load(quantization), replace(request, calibration=train)
    common = {"reference": source, "tokenizer": tokenizer, "revision": split_revision(model)[1]}
    mixture = plan_mixture(corrected, quantization, load, request=asked, **common) if request.mixed else None
    if mixture is not None:
        corrected, asked = load(mixture.config), replace(asked, budget=mixture.budget)
    asked = replace(asked, mixed=False)
    kept_blocks = kept if resume else None
    correction = correct(corrected, resume=kept_blocks, dense=base == "dense", request=asked, **common)
    if not request.force:
        _check_better(correction)
    held_out = None if score is None else held_out_figures(score, corrected, held, request.seed)
    for stored in (correction.config, corrected.config.quantization_config):
        stored.record(command=command, held_out=held_out, mixed=None if mixture is None else mixture.record)
    _save(correction, corrected, target, format or ("correction" if correction.unstored is None else "full"))
    if resume:
        remove_blocks(kept)
    return {
        "output": os.fspath(output),
        "groups": len(correction.ranks),
        "ranks": correction.ranks,
        "factor_bytes": correction.factor_bytes,
        "base_bytes": correction.base_bytes,
        "overhead": correction.overhead,
        "predicted": correction.predicted,
        "instead": correction.config.provenance.instead,
        "gains": correction.config.provenance.gains,
        "calibration_tokens": correction.config.provenance.calibration_tokens,
        "factor_dtype": correction.config.provenance.factor_dtype or "float",
        "distilled_steps": correction.config.provenance.distilled_steps,
        "rounding": correction.config.provenance.rounding,
        "improvement": correction.config.provenance.improvement,
        "held_out": held_out,
        "mixed": None if mixture is None else {**mixture.record, "ranks_gain": mixture.ranks_gain},
        "coverage": covered(correction.config.provenance.coverage, (entry.group for entry in correction.factors)),
        "seed": request.seed,
        "slow_here": slow_here(corrected),
    }


def _check_better(correction: Correction) -> None:
    """Refuse a correction that is not better than none beyond chance. `correct` has refused what is worse."""
    found = correction.config.provenance.improvement
    if found is not None and not is_better(found):
        raise NoImprovementError(f"the correction is not better than none: {not_better(found)}")


@stage("saving")
def _save(correction: Correction, model: Any, target: Path, format: str) -> None:
    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        correction.tokenizer.save_pretrained(folder)
        correction.write_card(folder)

    if format == "full":
        correction.config = correction.config.with_format("full")
    write_directory(target, write if format == "full" else correction.write_files, checked=True)
