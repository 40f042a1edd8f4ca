"""What rounding a correction's factors to int8 costs, measured on text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..data.tokens import batches
from ..errors import RoundingError
from ..factors.factors import GroupFactors
from ..models.forward import evaluating, to_model
from ..runtime.attach import applied
from ..selection.rounding import NEGLIGIBLE
from .divergence import answer, divergences

__all__ = ["rounding_cost"]

_BATCH_TOKENS = 1024


def rounding_cost(
    model: nn.Module,
    reference: nn.Module,
    found: Sequence[GroupFactors],
    same_ranks: Sequence[GroupFactors],
    same_bytes: Sequence[GroupFactors],
    sequences: Tensor,
) -> dict[str, Any]:
    """Measure what rounding costs on text, and refuse what loses more than it wins.

    Args:
        model: quantized, without a correction; left so.
        reference: the full-precision model.
        found: the rounded factors.
        same_ranks: what was rounded.
        same_bytes: unrounded factors in as many bytes as `found` takes; empty where no rank fits.
        sequences: token ids that the factors were not calibrated on, shape (n, length), int64.

    Returns:
        "tokens", and the mean divergence from the reference (nats a token; squared distance of an encoder's states) of
        the "quantized" model and of the model with each of the three: "int8", "same_ranks" and "same_bytes".

    Raises:
        RoundingError: the int8 factors leave more of the divergence than those of the same bytes, by over a hundredth
            of what the factors undo, or more than no factors at all.
    """
    several = {"quantized": (), "int8": found, "same_ranks": same_ranks, "same_bytes": same_bytes}
    figures: dict[str, Any] = dict(_divergences(model, reference, several, sequences))
    margin = NEGLIGIBLE * max(0.0, figures["quantized"] - figures["same_ranks"])
    if figures["int8"] > min(figures["quantized"], figures["same_bytes"] + margin):
        raise RoundingError(
            f"int8 factors leave {figures['int8']:.4g} of the quantized model's divergence {figures['quantized']:.4g} "
            f"(on {sequences.numel()} tokens that the factors were not calibrated on), and unrounded ones in the same "
            f"bytes {figures['same_bytes']:.4g}: rounding loses more than it wins. Correct without int8 factors."
        )
    return {"tokens": sequences.numel(), **figures}


@torch.no_grad()
def _divergences(
    model: nn.Module, reference: nn.Module, several: Mapping[str, Sequence[GroupFactors]], sequences: Tensor
) -> dict[str, float]:
    sums = dict.fromkeys(several, 0.0)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(evaluating(reference))
        for batch in batches(sequences, max(1, _BATCH_TOKENS // sequences.shape[1])):
            wanted = answer(reference(**to_model(batch, reference)))
            inputs = to_model(batch, model)
            for name, factors in several.items():
                with applied(model, factors):
                    given = answer(model(**inputs))
                found = divergences([part.to(given[0].device) for part in wanted], given)
                sums[name] += float(found.double().mean()) * len(batch["input_ids"])
    return {name: found / len(sequences) for name, found in sums.items()}
