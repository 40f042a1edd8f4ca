"""Measure on text how much accuracy is lost by rounding a correction's factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..data.inputs import Samples
from ..errors import RoundingError
from ..factors.factors import GroupFactors
from ..factors.form import dtype_name
from ..selection.rounding import NEGLIGIBLE
from .improvement import measured_divergences

__all__ = ["rounding_cost"]


def rounding_cost(
    model: nn.Module,
    reference: nn.Module,
    found: Sequence[GroupFactors],
    same_ranks: Sequence[GroupFactors],
    same_bytes: Sequence[GroupFactors],
    sequences: Samples,
) -> dict[str, Any]:
    """Compare rounded factors with unrounded factors on text, and raise an error if they are worse in the same bytes.

    Args:
        model: quantized model without a correction. It has no correction afterwards.
        reference: full-precision model.
        found: the rounded factors.
        same_ranks: the same factors before rounding.
        same_bytes: unrounded factors that take no more bytes than `found`; empty if no rank fits.
        sequences: token ids that the factors were not calibrated on, shape (n, length), int64.

    Returns:
        "tokens", and the mean divergence from the reference (nats per token, or squared distance of an encoder's
        states) for four models: "quantized", without factors; "rounded", with `found`; "same_ranks" and "same_bytes",
        with these factors.

    Raises:
        RoundingError: the divergence with rounded factors is larger than without factors; or it is larger than with
            `same_bytes`, by more than a hundredth of what `same_ranks` removes.
    """
    several = {"quantized": (), "rounded": found, "same_ranks": same_ranks, "same_bytes": same_bytes}
    found_divergences = measured_divergences(model, reference, several, sequences)
    figures: dict[str, Any] = {name: float(values.mean()) for name, values in found_divergences.items()}
    margin = NEGLIGIBLE * max(0.0, figures["quantized"] - figures["same_ranks"])
    if figures["rounded"] > min(figures["quantized"], figures["same_bytes"] + margin):
        dtype = dtype_name(found[0].bits)
        raise RoundingError(
            f"{dtype} factors leave {figures['rounded']:.4g} of the quantized model's divergence "
            f"{figures['quantized']:.4g} (on {sequences.numel()} tokens that the factors were not calibrated on), and "
            f"unrounded ones in the same bytes {figures['same_bytes']:.4g}: rounding loses more than the saved bytes "
            f"gain. Factors in float lose less."
        )
    return {"tokens": sequences.numel(), **figures}
