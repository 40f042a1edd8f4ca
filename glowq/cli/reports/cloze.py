"""The figures of a cloze test: one entry per model for the JSON output, and text for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...evaluation.cloze import ClozeScore
    from ...evaluation.intervals import Interval

__all__ = ["cloze_figures", "cloze_notes", "cloze_text"]


def cloze_figures(scores: Mapping[str, ClozeScore], over: str, seed: int) -> dict[str, Any]:
    """Every model's accuracy, and what it gains over one of them, with 95% paired bootstrap intervals over items.

    Args:
        scores: name -> answers to the same items.
        over: name of the model that the others are compared with.
        seed: seed of the bootstrap.

    Returns:
        "items": number of items; "over": as given; "models": name -> "accuracy", "accuracy_ci95", "gain" and
        "gain_ci95", as shares of the items. The gain of the model `over` is None, and so is an interval of too few
        items.
    """
    from ...evaluation.cloze import accuracy, accuracy_gain

    models = {}
    for name, score in scores.items():
        count = len(score.correct)
        models[name] = _interval("accuracy", accuracy(score, seed=seed), count)
        gain = None if name == over else accuracy_gain(scores[over], score, seed=seed)
        models[name].update({"gain": None, "gain_ci95": None} if gain is None else _interval("gain", gain, count))
    return {"items": len(scores[over].correct), "over": over, "models": models}


def _interval(name: str, interval: Interval, items: int) -> dict[str, Any]:
    from ...evaluation.intervals import LEAST_SEQUENCES

    limits = [interval.low, interval.high] if items >= LEAST_SEQUENCES else None
    return {name: interval.value, f"{name}_ci95": limits}


def cloze_text(figures: Mapping[str, Any]) -> str:
    """The accuracy of a model with its interval, as in "71.5% [65.0%, 77.5%]"."""
    return _shown(figures["accuracy"], figures["accuracy_ci95"], ".1%")


def cloze_notes(cloze: Mapping[str, Any]) -> list[str]:
    """A line of text about the test, and one for each model."""
    lines = [f"Cloze, {cloze['items']} items, share answered right (chance: 25%), gain over {cloze['over']}:"]
    for name, found in cloze["models"].items():
        points = None if found["gain_ci95"] is None else [100 * limit for limit in found["gain_ci95"]]
        gain = "" if found["gain"] is None else f"; {_shown(100 * found['gain'], points, '+.1f')} points"
        lines.append(f"- {name}: {cloze_text(found)}{gain}.")
    return lines


def _shown(value: float, limits: list[float] | None, form: str) -> str:
    if limits is None:
        return format(value, form)
    return f"{value:{form}} [{limits[0]:{form}}, {limits[1]:{form}}]"
