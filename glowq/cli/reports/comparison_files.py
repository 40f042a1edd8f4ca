"""Show and save a comparison: tables for a terminal and for Markdown, and the folder of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..output import markdown_table, table
from .cloze import cloze_notes

if TYPE_CHECKING:
    from ...selection.benefit import Benefit

__all__ = ["markdown", "tables", "write_comparison"]

_CLOSE = 0.1  # a prediction that differs by more is explained

_HEADINGS = ("method", "budget", "bytes", "rank", "perplexity", "gap recovered", "KL, nats", "KL undone", "top-1")


def write_comparison(target: Path, result: dict[str, Any], benefit: Benefit | None) -> None:
    """Write compare.json, table.md, bytes.png and, if there is a `benefit`, heatmap.png.

    If an error occurs, nothing is written.

    Args:
        target: folder that `check_output` accepted before the comparison.
        result: see `glowq compare --json`.
        benefit: what the heat map shows; None for no heat map.

    Raises:
        OutputError: see `write_directory`.
    """
    from ...evaluation.plots import draw_benefit, draw_recovered
    from ...utils.output import Kind, write_directory

    lines: dict[str, list[dict[str, Any]]] = {}
    hidden = {} if _has_gap(result) else {"recovered": None}
    for row in result["rows"]:
        if row["same_as"] is None:
            lines.setdefault(_with_equals(row["method"], result), []).append({**row, **hidden})

    def write(folder: Path) -> None:
        (folder / "compare.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        (folder / "table.md").write_text(markdown(result))
        draw_recovered(folder / "bytes.png", lines, _title(result))
        if benefit is not None:
            draw_benefit(folder / "heatmap.png", benefit)

    write_directory(target, write, kind=Kind.COMPARISON, checked=True)


def markdown(result: dict[str, Any]) -> str:
    """The text of table.md: the rows, the data that they were measured on, and the command."""
    return "\n".join(
        [
            f"# {_title(result)}",
            "",
            *markdown_table(_HEADINGS, _cells(result)),
            "",
            *(f"{note}  " for note in _notes(result)),  # two spaces: a line break
            "",
            "```",
            result["command"],
            "```",
            "",
        ]
    )


def tables(result: dict[str, Any]) -> Any:
    """The rows for a terminal."""
    from rich.console import Group

    return Group(table(_title(result), _HEADINGS, _cells(result), ["method"]), *_notes(result))


def _title(result: dict[str, Any]) -> str:
    return f"{result['model']}, {result['base']}: methods at equal bytes"


def _notes(result: dict[str, Any]) -> list[str]:
    data, overlap = result["data"], result["overlap"]
    notes = [
        f"{data['tokens']:,} tokens of {data['source']} in {data['sequences']} sequences; calibrated, and ranks "
        f"chosen, on {result['calibration']['tokens']:,} tokens of {result['calibration']['source']}; "
        f"seed {result['seed']}; brackets: 95% paired bootstrap over sequences.",
        "A uniform rank leaves some bytes of its budget unused; the column of bytes shows how many each method takes.",
    ]
    notes += _predictions([row for row in result["rows"] if row["predicted"] is not None and row["undone"] is not None])
    if overlap["windows"]:
        notes.append(
            f"{overlap['windows'] / overlap['of']:.1%} of this text was calibrated on (--force), so that the figures "
            "look better than they are."
        )
    if any(row["allocation"] == "alternative" for row in result["rows"]):
        notes.append(
            "finer, wider and mixed are no corrections but other settings of the base's library: half the group size, "
            "the next bit width for all modules, and more bits for the groups that gain most by measured divergence. "
            "Their bytes are those of the weights above the base's."
        )
    for reason in dict.fromkeys(row["reason"] for row in result["rows"] if row["reason"] is not None):
        left_out = [row for row in result["rows"] if row["reason"] == reason]
        names = [f"{row['method']} at {row['budget']}" if row["budget"] else row["method"] for row in left_out]
        notes.append(f"Nothing chosen by {', '.join(names)}: {reason}.")
    equal = {row["method"]: row["same_as"] for row in result["rows"] if row["same_as"] is not None}
    notes += [f"{method} is the same solve as {first}." for method, first in equal.items()]
    notes += cloze_notes(result["cloze"]) if "cloze" in result else []
    for model, tasks in result.get("tasks", {}).items():
        for task, metrics in tasks.items():
            shown = ", ".join(f"{name} {_text(metric['value'], metric['ci95'])}" for name, metric in metrics.items())
            notes.append(f"{task}, {model}: {shown}.")
    if "tasks" in result:
        notes.append("The tasks' texts were not compared with the calibration text.")
    return notes


def _predictions(rows: list[dict[str, Any]]) -> list[str]:
    """What was predicted before any evaluation, beside what was measured; and why the two may differ by much."""
    if not rows:
        return []
    shares = ", ".join(
        f"{row['method']} at {row['budget']} {row['predicted']:.1%} (measured {row['undone']:.1%})" for row in rows
    )
    notes = [f"Predicted before any evaluation, share of the KL divergence undone: {shares}."]
    if any(abs(row["predicted"] - row["undone"]) > _CLOSE for row in rows):
        notes.append(
            "Where the two differ by more than 10 points: the prediction adds up what the chosen ranks undo on few "
            "tokens of the calibration text, beside all other ranks that were solved. On other text, or without the "
            "other ranks, they undo more or less."
        )
    return notes


def _cells(result: dict[str, Any]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [
        (
            *(row["model"], "", "", "", _of(row, "perplexity", ".3f"), ""),
            *(_of(row, "kl", ".4f"), "", _of(row, "top1", ".1%")),
        )
        for row in result["models"]
    ]
    from ...evaluation.figures import NO_GAP

    gap = _has_gap(result)
    for row in result["rows"]:
        size = f"{row['factor_bytes']:,} (+{row['overhead']:.2%})" if row["perplexity"] is not None else ""
        rank = "" if row["perplexity"] is None else _ranks(row)
        share = _of(row, "recovered", ".1%") if gap or row["perplexity"] is None else NO_GAP
        closeness = (_of(row, "kl", ".4f"), _of(row, "undone", ".1%"), _of(row, "top1", ".1%"))
        found.append((row["method"], row["budget"], size, rank, _of(row, "perplexity", ".3f"), share, *closeness))
    return found


def _ranks(row: dict[str, Any]) -> str:
    if row["allocation"] == "alternative":
        return str(row["settings"])
    whole = f"{row['rank']} in {row['groups']} groups"
    chosen = {"gain": "by gain", "groups": whole, "effective-rank": "by effective rank"}
    return chosen.get(row["allocation"], str(row["rank"]))


def _has_gap(result: dict[str, Any]) -> bool:
    from ...evaluation.figures import has_gap

    reference, quantized = result["models"]
    return has_gap(reference["perplexity"], quantized["perplexity"])


def _of(row: dict[str, Any], name: str, form: str) -> str:
    return _text(row[name], row[f"{name}_ci95"], form)


def _text(value: float | None, limits: list[float | None] | None, form: str = ".4f") -> str:
    if value is None:
        return "-"
    if limits is None:
        return format(value, form)
    low, high = ("-" if limit is None else format(limit, form) for limit in limits)
    return f"{value:{form}} [{low}, {high}]"


def _with_equals(method: str, result: dict[str, Any]) -> str:
    """A method's name, with the names of all methods that have the same line in the plot."""
    equal = dict.fromkeys(row["method"] for row in result["rows"] if row["same_as"] == method)
    return " = ".join((method, *equal))
