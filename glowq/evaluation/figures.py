"""What figures say, and how they are shown: words for undefined ones, for a gap that is too small, for chance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = [
    "NO_GAP",
    "finite",
    "has_gap",
    "interval_ends",
    "is_better",
    "is_worse",
    "measured_share",
    "not_better",
    "shown",
    "shown_share",
    "undone",
]

NO_GAP = "no gap to recover"
_LEAST_GAP = 1e-3  # of the reference's perplexity; the share of a smaller gap is mostly noise of the text


def has_gap(reference: float | None, quantized: float | None) -> bool:
    """Whether the gap between two perplexities is large enough for a share of it; True if one is undefined (None)."""
    return reference is None or quantized is None or quantized >= (1 + _LEAST_GAP) * reference


def finite(value: float) -> float | None:
    """`value`, or None (JSON's null) where it is NaN or infinite."""
    return value if math.isfinite(value) else None


def shown(value: float | None, form: str) -> str:
    """Format a figure for people, in a format such as ".4f"; None becomes "undefined"."""
    return "undefined" if value is None else format(value, form)


def shown_share(figures: Mapping[str, Any]) -> str:
    """Format the recovered share of the gap with its interval, or the reason why the share is not meaningful.

    Args:
        figures: "reference" and "quantized", the perplexities; "recovered", the share; and "recovered_ci95", (low,
            high), or None if there were too few sequences to resample. A figure is None if it is undefined.
    """
    if not has_gap(figures["reference"], figures["quantized"]):
        return NO_GAP
    share, limits = shown(figures["recovered"], ".1%"), figures.get("recovered_ci95")
    if limits is None:
        return f"too few tokens to tell ({share})"
    return f"{share} [{shown(limits[0], '.1%')}, {shown(limits[1], '.1%')}]"


def undone(figures: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Return the shares of the quantized model's divergence that a correction removes, with and without rounding.

    Args:
        figures: what `glowq.evaluation.rounding_cost` measured; None if nothing was rounded.

    Returns:
        "rounded", "same_bytes" and "same_ranks" -> share; None if nothing was measured, or if quantization changed
        nothing.
    """
    if not figures or figures["quantized"] <= 0:
        return None
    return {name: 1 - figures[name] / figures["quantized"] for name in ("rounded", "same_bytes", "same_ranks")}


def measured_share(found: Mapping[str, Any] | None) -> float | None:
    """The share of the divergence that an `improvement` undoes; None if there was none, or nothing was measured."""
    if found is None or not found["quantized"] > 0:
        return None
    return float(1 - found["corrected"] / found["quantized"])


def is_better(found: Mapping[str, Any]) -> bool:
    """Whether an `improvement` is one beyond chance; on too little text for an interval, whether it is one at all."""
    benefit = found["benefit"]
    return bool(benefit["value"] > 0 and (benefit["low"] is None or benefit["low"] > 0))


def is_worse(found: Mapping[str, Any]) -> bool:
    """Whether an `improvement` is negative beyond chance."""
    high = found["benefit"]["high"]
    return high is not None and bool(high < 0)


def interval_ends(found: Mapping[str, Any]) -> tuple[str, str]:
    """The ends of the interval of an `improvement` as text."""
    low, high = (found["benefit"][end] for end in ("low", "high"))
    return ("unknown", "unknown") if low is None else (f"{low:.2g}", f"{high:.2g}")


def not_better(found: Mapping[str, Any]) -> str:
    """Words for an error about an `improvement` that is none: its figures, and what to do."""
    low, high = interval_ends(found)
    return (
        f"on {found['tokens']:,} tokens that it was not calibrated on, the divergence from the reference is "
        f"{found['corrected']:.4g} with it and {found['quantized']:.4g} without (95% interval of the difference: "
        f"{low} to {high}). Nothing is kept. Calibrate on more text, or on text that is more similar to the "
        "model's task; or keep it all the same with force=True (--force)."
    )
