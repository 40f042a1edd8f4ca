"""The figures of a comparison, one row per model, in the form of the JSON output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...evaluation.figures import finite

if TYPE_CHECKING:
    from ...evaluation.intervals import Interval
    from ...evaluation.scores import Score
    from ...pipeline.compare.alternatives import Alternative
    from ...pipeline.compare.budgets import Entry
    from ...pipeline.compare.comparison import Comparison

__all__ = ["figures"]

_BASELINE = "glowq"


def figures(
    comparison: Comparison, scores: Mapping[str, Score], seed: int, alternatives: Sequence[Alternative] = ()
) -> dict[str, Any]:
    """Every model's figures with 95% paired bootstrap intervals over sequences; None if a figure is undefined.

    Args:
        comparison: its entries become rows.
        scores: what `score_entries` returned for the entries, and the scores of the alternatives by their labels.
        seed: seed of the bootstrap.
        alternatives: become rows after those of the entries.

    Returns:
        "models": the reference and the quantized model; "rows": one per method and budget; "pairs": perplexity of every
        method divided by that of glowq at the same budget.
    """
    base_bytes = comparison.base_bytes
    return {
        "models": [{"model": name, **_own(scores[name], seed)} for name in ("reference", "quantized")],
        "rows": [
            *(_row(entry, base_bytes, scores, seed) for entry in comparison.entries),
            *(_alternative_row(other, base_bytes, scores, seed) for other in alternatives),
        ],
        "pairs": _pairs(comparison, scores, seed, alternatives),
    }


def _row(entry: Entry, base_bytes: int, scores: Mapping[str, Score], seed: int) -> dict[str, Any]:
    row = {
        "method": entry.method,
        "allocation": entry.allocation,
        "budget": entry.budget,
        "budget_bytes": entry.budget_bytes,
        "rank": entry.rank,
        "groups": len(entry.factors),
        "factor_bytes": entry.factor_bytes,
        "overhead": entry.factor_bytes / base_bytes,
        "predicted": entry.predicted,
        "reason": entry.reason,
        "same_as": entry.same_as,
    }
    return _with_figures(row, scores.get(entry.label), scores, seed)


def _alternative_row(other: Alternative, base_bytes: int, scores: Mapping[str, Score], seed: int) -> dict[str, Any]:
    """As `_row`; the bytes of its factors are those of the weights above the quantized model's."""
    row = {
        "method": other.method,
        "allocation": "alternative",
        "budget": other.budget,
        "budget_bytes": other.budget_bytes,
        "rank": None,
        "groups": len(other.widened),
        "factor_bytes": other.added_bytes,
        "overhead": other.added_bytes / base_bytes,
        "predicted": None,
        "reason": other.reason,
        "same_as": None,
        "settings": other.settings,
        "widened": list(other.widened),
    }
    return _with_figures(row, scores.get(other.label), scores, seed)


def _with_figures(row: dict[str, Any], score: Score | None, scores: Mapping[str, Score], seed: int) -> dict[str, Any]:
    from ...evaluation.scores import perplexity, perplexity_ratio, recovered, undone

    if score is None:
        names = ("perplexity", "kl", "top1", "ppl_ratio", "recovered", "undone")
        return {**row, **{key: None for name in names for key in (name, f"{name}_ci95")}}
    reference, quantized = scores["reference"], scores["quantized"]
    row.update(_own(score, seed))
    row.update(_interval("ppl_ratio", perplexity_ratio(quantized, score, seed=seed), len(score.nll)))
    row.update(_interval("recovered", recovered(reference, quantized, score, seed=seed), len(score.nll)))
    row.update(_interval("undone", undone(quantized, score, seed=seed), len(score.nll)))
    if perplexity(quantized) <= perplexity(reference):  # there is no gap, so the recovered share is undefined
        row.update(recovered=None, recovered_ci95=None)
    return row


def _own(score: Score, seed: int) -> dict[str, Any]:
    from ...evaluation.intervals import bootstrap

    found = {
        "perplexity": bootstrap(lambda means: means[..., 0].exp(), score.nll[:, None], seed=seed),
        "kl": bootstrap(lambda means: means[..., 0], score.kl[:, None], seed=seed),
        "top1": bootstrap(lambda means: means[..., 0], score.top1[:, None], seed=seed),
    }
    own: dict[str, Any] = {}
    for name, interval in found.items():
        own.update(_interval(name, interval, len(score.nll)))
    return own


def _pairs(
    comparison: Comparison, scores: Mapping[str, Score], seed: int, alternatives: Sequence[Alternative]
) -> list[dict[str, Any]]:
    from ...evaluation.scores import perplexity_ratio

    ours = {entry.budget: entry for entry in comparison.entries if entry.method == _BASELINE and entry.factors}
    others: list[tuple[Entry | Alternative, int]] = [
        (entry, entry.factor_bytes) for entry in comparison.entries if entry.method != _BASELINE and entry.factors
    ]
    others += [(other, other.added_bytes) for other in alternatives if other.reason is None]
    pairs = []
    for entry, added_bytes in others:
        if entry.budget in ours:
            baseline, score = ours[entry.budget], scores[entry.label]
            ratio = perplexity_ratio(scores[baseline.label], score, seed=seed)
            pair = {
                "method": entry.method,
                "over": _BASELINE,
                "budget": entry.budget,
                "factor_bytes": added_bytes,
                "over_factor_bytes": baseline.factor_bytes,
            }
            pairs.append({**pair, **_interval("ppl_ratio", ratio, len(score.nll))})
    return pairs


def _interval(name: str, interval: Interval, sequences: int) -> dict[str, Any]:
    from ...evaluation.intervals import LEAST_SEQUENCES

    limits = [finite(interval.low), finite(interval.high)]
    return {name: finite(interval.value), f"{name}_ci95": limits if sequences >= LEAST_SEQUENCES else None}
