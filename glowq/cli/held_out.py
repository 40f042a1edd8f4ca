"""What a correction recovers on text that it was not calibrated on."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ..loading import load_config, load_model, token_limits
from .common import finite

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation import Score

__all__ = ["LEAST_SEQUENCES", "held_out_figures", "held_out_rows", "parted_sequences", "reference_score"]

_HELD_OUT = 1 / 8  # of the calibration sequences
LEAST_SEQUENCES = 8  # resampling fewer gives no interval worth the name


def parted_sequences(
    config: Any, tokenizer: Any, calibration: str, tokens: int, sequence_length: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Token ids to calibrate on and to measure on, each of shape (n, length), n >= 1.

    Raises:
        CalibrationError: the text, or `tokens`, is shorter than one sequence for each.
    """
    from ..data import read_texts, split, token_sequences

    length, vocab_size = token_limits(config, sequence_length)
    texts = read_texts(calibration)
    sequences = token_sequences(
        texts, tokenizer, length=length, limit=tokens, seed=seed, vocab_size=vocab_size, least=2
    )
    return split(sequences, _HELD_OUT, seed)


def reference_score(reference: str, held: Tensor) -> Score:
    """The reference model on `held`, token ids of shape (n, length); the model is loaded for this and let go."""
    from ..evaluation import score_models

    return score_models({reference: load_model(reference, load_config(reference))}, held)[reference]


def held_out_figures(reference: Score, model: Any, held: Tensor, seed: int) -> dict[str, Any]:
    """Perplexities of the reference and of `model` without and with its correction, and the share recovered."""
    from .. import disabled
    from ..evaluation import perplexity, recovered, score_models

    scores = {"reference": reference}
    for name, context in (("quantized", disabled(model)), ("corrected", nullcontext())):
        with context:
            scores.update(score_models({name: model}, held))
    share = recovered(scores["reference"], scores["quantized"], scores["corrected"], seed=seed)
    return {
        **{name: finite(perplexity(score)) for name, score in scores.items()},
        "recovered": finite(share.value),
        "recovered_ci95": None if len(held) < LEAST_SEQUENCES else [finite(share.low), finite(share.high)],
        "tokens": held.numel(),
    }


def held_out_rows(figures: dict[str, Any] | None) -> dict[str, str]:
    """The figures for people, name -> text."""
    from ..evaluation import NO_GAP, has_gap

    if figures is None:
        return {}

    def text(value: float | None, form: str) -> str:
        return "undefined" if value is None else format(value, form)

    limits = figures["recovered_ci95"]
    interval = "" if limits is None else f" [{text(limits[0], '.1%')}, {text(limits[1], '.1%')}]"
    share = f"{text(figures['recovered'], '.1%')}{interval}"
    if limits is None:
        share = f"too few tokens to tell ({share})"
    if not has_gap(figures["reference"], figures["quantized"]):
        share = NO_GAP
    return {
        **{f"{name} perplexity": text(figures[name], ".4f") for name in ("reference", "quantized", "corrected")},
        "recovered": f"{share} on {figures['tokens']:,} held-out tokens",
    }
