"""Figures for people: what is undefined says so, and a share of next to nothing is none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["NO_GAP", "finite", "has_gap", "shown", "shown_share", "undone"]

NO_GAP = "no gap to recover"
_LEAST_GAP = 1e-3  # of the reference's perplexity: a share of less is the noise of the text, divided by next to nothing


def has_gap(reference: float | None, quantized: float | None) -> bool:
    """Whether a share of the gap between two perplexities says anything; None is one that is undefined."""
    return reference is None or quantized is None or quantized >= (1 + _LEAST_GAP) * reference


def finite(value: float) -> float | None:
    """`value`, or None (JSON's null) where it is NaN or infinite."""
    return value if math.isfinite(value) else None


def shown(value: float | None, form: str) -> str:
    """A figure for people in a format such as ".4f"; one that is undefined (None) says so."""
    return "undefined" if value is None else format(value, form)


def shown_share(figures: Mapping[str, Any]) -> str:
    """The share of the gap that was recovered, for people: with its interval, or with the reason why it says nothing.

    Args:
        figures: "reference" and "quantized", perplexities; "recovered"; and "recovered_ci95", (low, high) or None where
            there were too few sequences to resample. Any of them is None where it is undefined.
    """
    if not has_gap(figures["reference"], figures["quantized"]):
        return NO_GAP
    share, limits = shown(figures["recovered"], ".1%"), figures.get("recovered_ci95")
    if limits is None:
        return f"too few tokens to tell ({share})"
    return f"{share} [{shown(limits[0], '.1%')}, {shown(limits[1], '.1%')}]"


def undone(figures: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Shares of the quantized model's divergence that a correction undoes in "int8", and unrounded.

    Args:
        figures: what `glowq.evaluation.rounding_cost` measured; None where nothing was rounded.

    Returns:
        None where nothing was measured, or quantization changed nothing.
    """
    if not figures or figures["quantized"] <= 0:
        return None
    return {name: 1 - figures[name] / figures["quantized"] for name in ("int8", "same_bytes", "same_ranks")}
