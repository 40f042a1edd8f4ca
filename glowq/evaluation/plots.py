"""Plots of a comparison and of a correction, drawn with matplotlib, which is the optional extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..selection.benefit import Benefit
    from ..selection.curve import CurvePoint

__all__ = ["can_plot", "check_plots", "draw_benefit", "draw_budgets", "draw_recovered", "draw_timing"]

_DPI = 150
_MARKERS = "osD^vPX*<>h"
_METADATA = {"Software": None}  # without matplotlib's version, so that the same figures give the same file


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def check_plots() -> None:
    """Check, before any work, that the plots at its end can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if not can_plot():
        raise ConfigError(
            "plots need matplotlib: pip install 'glowq[plot]', or leave out --output and take the figures from --json."
        )


def draw_recovered(
    file: Path,
    lines: Mapping[str, Sequence[Mapping[str, Any]]],
    title: str,
    share: str = "perplexity gap recovered",
) -> None:
    """Draw the recovered share of a loss against the added bytes, with intervals, one line per method.

    Args:
        file: PNG to write.
        lines: method -> points with "overhead", the added bytes as a share of the quantized weights; "recovered", or
            None for a point that is not drawn; and "recovered_ci95", (low, high) or None.
        title: title of the plot.
        share: what the shares are.
    """
    from matplotlib import colormaps

    figure = _figure(8.0, 5.0)
    axes = figure.add_subplot()
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    axes.set_prop_cycle(color=[*colours[::2], *colours[1::2]])  # ten strong ones, then the ten pale ones
    for (method, points), marker in zip(lines.items(), _MARKERS * len(lines), strict=False):
        drawn = sorted((point for point in points if point["recovered"] is not None), key=lambda p: p["overhead"])
        bytes_added = [100 * point["overhead"] for point in drawn]
        shares = [100 * point["recovered"] for point in drawn]
        axes.errorbar(bytes_added, shares, yerr=_whiskers(drawn), marker=marker, capsize=3, label=method)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xlabel("bytes added, % of the quantized weights")
    axes.set_ylabel(f"{share}, %")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    _save(figure, file)


def draw_budgets(file: IO[bytes], points: Sequence[CurvePoint], unit: str, title: str) -> None:
    """Draw the share that every budget is predicted to recover, as one line.

    Args:
        file: PNG to write.
        points: what `glowq.selection.curve.budget_curve` returned.
        unit: what the predicted shares are shares of.
        title: title of the plot.
    """
    figure = _figure(7.0, 4.0)
    axes = figure.add_subplot()
    axes.plot([100 * point.share_of_base for point in points], [100 * point.predicted for point in points], marker="o")
    axes.set_xscale("log")
    shares = [100 * point.share_of_base for point in points[:-1]]  # the last share is not round
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes kept, % of the quantized weights")
    axes.set_ylabel(f"predicted share recovered, %\n({unit})")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    _save(figure, file)


def draw_benefit(file: Path, benefit: Benefit) -> None:
    """Draw the predicted benefit as a heat map: one row per layer, one column per kind of group, blank if none exists.

    Args:
        file: PNG to write.
        benefit: at least one layer and kind.
    """
    values = [[float("nan") if value is None else value for value in row] for row in benefit.values]
    figure = _figure(2.5 + 1.3 * len(benefit.kinds), 2.0 + 0.3 * len(benefit.layers))
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(len(benefit.kinds)), benefit.kinds, rotation=30, ha="right", fontsize=7)
    axes.set_yticks(range(len(benefit.layers)), benefit.layers, fontsize=7)
    axes.set_title(f"predicted benefit of {benefit.budget}", fontsize=10)
    for row, line in enumerate(benefit.values):
        for column, value in enumerate(line):
            if value:  # a few groups have far larger values: the colours of the others look alike
                colour = "black" if value > image.norm.vmax / 2 else "white"
                axes.text(column, row, f"{value:.1e}", ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(image, ax=axes, label=benefit.unit)
    _save(figure, file)


def draw_timing(file: Path, rows: Sequence[Mapping[str, Any]], kinds: Sequence[str], title: str) -> None:
    """Draw the time that corrections add to a prompt and to a decoded token as bars, and their bytes as lines.

    Args:
        file: PNG to write.
        rows: rows of `glowq.evaluation.timing.measure` for the corrected models.
        kinds: "first_token" and "decode", or one of them.
        title: title of the plot.
    """
    figure = _figure(2.0 + 4.0 * len(kinds), 4.0)
    models = list(dict.fromkeys(row["model"] for row in rows))
    shapes = list(dict.fromkeys((row["batch"], row["length"]) for row in rows))
    width = 0.8 / len(models)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for place, model in enumerate(models):
            own = [row for row in rows if row["model"] == model]
            places = [at + (place - (len(models) - 1) / 2) * width for at in range(len(own))]
            axes.bar(places, [100 * row[f"{kind}_overhead"] for row in own], width, label=f"time, {model}")
            ends = [[at + side * width / 2 for at in places] for side in (-1, 1)]
            bytes_added = [100 * row["byte_ratio"] for row in own]
            axes.hlines(bytes_added, *ends, colors="black", label="bytes" if place == 0 else None)
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set_xticks(range(len(shapes)), [f"{batch} x {length}" for batch, length in shapes])
        axes.set_xlabel("batch x prompt, tokens")
        axes.set_ylabel("added, % of the base")
        axes.set_title({"first_token": "first token", "decode": "decode"}[kind], fontsize=10)
        axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    _save(figure, file)


def _whiskers(points: Sequence[Mapping[str, Any]]) -> list[list[float]] | None:
    """Distances from the points to the lower and upper ends of the intervals, in percent; None if one is undefined."""
    ends = [point["recovered_ci95"] or (None, None) for point in points]
    if any(end is None for pair in ends for end in pair):
        return None
    # The percentile interval of a skewed statistic may not contain the statistic itself.
    below = [max(0.0, 100 * (point["recovered"] - low)) for point, (low, _) in zip(points, ends, strict=True)]
    above = [max(0.0, 100 * (high - point["recovered"])) for point, (_, high) in zip(points, ends, strict=True)]
    return [below, above]


def _figure(width: float, height: float) -> Any:
    # Not pyplot, which looks for a window system and keeps every figure in a global list.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, file: Path | IO[bytes]) -> None:
    figure.savefig(file, format="png", dpi=_DPI, metadata=_METADATA)
