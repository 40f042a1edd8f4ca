"""Measure what a correction recovers on held-out text."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor

from ..data.inputs import split
from ..data.tokens import sequences_of
from ..models.loading import load_config, load_model, token_limits
from ..runtime.switching import disabled
from .figures import finite
from .intervals import LEAST_SEQUENCES
from .scores import Score, perplexity, recovered, score_models

__all__ = ["held_out_figures", "parted_sequences", "reference_score"]

_HELD_OUT = 1 / 8  # of the calibration sequences


def parted_sequences(
    config: Any, tokenizer: Any, calibration: str, tokens: int, sequence_length: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the token ids to calibrate on and the token ids to measure on, each of shape (n, length), n >= 1.

    Raises:
        CalibrationError: the text, or `tokens`, is shorter than two sequences.
    """
    length, vocab_size = token_limits(config, sequence_length)
    sequences = sequences_of(
        calibration, tokenizer, length=length, limit=tokens, seed=seed, vocab_size=vocab_size, least=2
    )
    return split(sequences, _HELD_OUT, seed)


def reference_score(reference: str, held: Tensor) -> Score:
    """Load the reference model and score it on `held`, token ids of shape (n, length); the model is not kept."""
    return score_models({reference: load_model(reference, load_config(reference))}, held)[reference]


def held_out_figures(reference: Score, model: Any, held: Tensor, seed: int) -> dict[str, Any]:
    """Return the perplexities of the reference, of `model` without and with its correction, and the recovered share."""
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
