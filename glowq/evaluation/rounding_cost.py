"""Measure on text how much accuracy is lost by rounding a correction's factors to int8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import RoundingError
from ..factors.factors import GroupFactors
from ..selection.rounding import NEGLIGIBLE
from .improvement import measured_divergences

__all__ = ["rounding_cost"]


def rounding_cost(
    model: nn.Module,
    reference: nn.Module,
    found: Sequence[GroupFactors],
    same_ranks: Sequence[GroupFactors],
    same_bytes: Sequence[GroupFactors],
    sequences: Tensor,
) -> dict[str, Any]:
    """Compare int8 factors with unrounded factors on text, and raise an error if they are worse in the same bytes.

    Args:
        model: quantized model without a correction. It has no correction afterwards.
        reference: full-precision model.
        found: the rounded factors.
        same_ranks: the same factors before rounding.
        same_bytes: unrounded factors that take no more bytes than `found`; empty if no rank fits.
        sequences: token ids that the factors were not calibrated on, shape (n, length), int64.

    Returns:
        "tokens", and the mean divergence from the reference (nats per token, or squared distance of an encoder's
        states) for four models: "quantized", without factors; "int8", with `found`; "same_ranks" and "same_bytes", with
        these factors.

    Raises:
        RoundingError: the divergence with int8 factors is larger than without factors; or it is larger than with
            `same_bytes`, by more than a hundredth of what `same_ranks` removes.
    """
    several = {"quantized": (), "int8": found, "same_ranks": same_ranks, "same_bytes": same_bytes}
    found_divergences = measured_divergences(model, reference, several, sequences)
    figures: dict[str, Any] = {name: float(values.mean()) for name, values in found_divergences.items()}
    margin = NEGLIGIBLE * max(0.0, figures["quantized"] - figures["same_ranks"])
    if figures["int8"] > min(figures["quantized"], figures["same_bytes"] + margin):
        raise RoundingError(
            f"int8 factors leave {figures['int8']:.4g} of the quantized model's divergence {figures['quantized']:.4g} "
            f"(on {sequences.numel()} tokens that the factors were not calibrated on), and unrounded ones in the same "
            f"bytes {figures['same_bytes']:.4g}: rounding loses more than the saved bytes gain. Correct without int8 "
            "factors."
        )
    return {"tokens": sequences.numel(), **figures}
