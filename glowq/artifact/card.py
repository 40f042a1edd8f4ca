"""The model cards of corrected models (both saved forms) and exports, made from the templates in `model_cards/`."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load, try_to_load_from_cache
from yaml import YAMLError  # type: ignore[import-untyped]

from ..errors import GlowQError
from ..evaluation.figures import has_gap, interval_ends, is_better, shown, shown_share, undone
from ..evaluation.plots import can_plot, draw_budgets
from ..factors.units import GainUnit
from ..quantizers.registry import method_of
from ..selection.allocation import GroupGains
from ..selection.curve import CurvePoint, budget_curve
from ..utils.files import read_json
from .correction_config import CorrectionConfig
from .coverage import covered

__all__ = ["CARD", "PICTURE", "base_license", "card_files", "export_card", "license_of"]

CARD = "README.md"
PICTURE = "budgets.png"

_TAGS = ["glowq", "quantized", "low-rank-correction"]
_LICENSE = ("license", "license_name", "license_link")
_PERPLEXITIES = {"reference": "full precision", "quantized": "quantized", "corrected": "corrected"}


def card_files(
    config: CorrectionConfig,
    group_gains: Sequence[GroupGains],
    *,
    license: Mapping[str, Any] | None = None,
    repository: str = "this/repository",
    picture: bool | None = None,
) -> dict[str, bytes]:
    """The model card of a corrected model, and its plot of the predicted recovery at smaller budgets.

    Args:
        config: what config.json stores. Its provenance may hold "command" (the exact command line) and "held_out" (the
            figures of `glowq correct --json`); sections without data are left out.
        group_gains: one entry per restored group.
        license: license fields of the base, see `base_license`.
        repository: Hub name of the model in the card's code examples.
        picture: whether to draw the plot; None draws it if matplotlib is installed.

    Returns:
        File name -> content: "README.md", and "budgets.png" if it was drawn. The content depends neither on the time
        nor on the machine.
    """
    provenance, base_bytes = config.provenance, config.base_bytes or 0
    base_model: dict[str, Any] = config.base_model or {}
    name = str(base_model.get("name", ""))
    title = f"{Path(name).name}, corrected by glowq"
    unit = (provenance.gains or GainUnit.UNMEASURED).description
    curve = [] if provenance.distilled_steps else budget_curve(group_gains, config.total, base_bytes)
    drawn = len(curve) > 1 and (can_plot() if picture is None else picture)
    factor_bytes = sum(item.rank_bytes * len(item.gains) for item in group_gains)
    ranks = sorted({len(item.gains) for item in group_gains}) or [0]
    card = ModelCard.from_template(
        _metadata(name, title, provenance.held_out, license or {}),
        template_path=str(_templates() / "correction.md"),
        full=config.format == "full",
        title=title,
        base_model_name=Path(name).name if Path(name).is_absolute() else name,
        revision=base_model.get("revision"),
        base=method_of(config.base),
        method=config.method,
        seed=config.seed,
        group_count=len(group_gains),
        module_count=sum(len(item.group.members) for item in group_gains),
        coverage=covered(provenance.coverage, (item.group for item in group_gains)),
        ranks=str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        factor_bytes=f"{factor_bytes:,}",
        overhead=f"{factor_bytes / base_bytes:.2%}" if base_bytes else "an unknown share",
        calibration_tokens=_count(provenance.calibration_tokens),
        held_out=_held_out(provenance.held_out),
        improvement=_improvement(provenance.improvement),
        selected=provenance.selected,
        distilled=provenance.distilled_steps,
        factor_dtype=provenance.factor_dtype,
        rounding=_rounding(provenance.rounding),
        curve=_rows(curve),
        picture=PICTURE if drawn else None,
        unit=unit,
        command=provenance.command,
        repository=repository,
    )
    files = {CARD: str(card.content).encode()}
    if drawn:
        files[PICTURE] = _picture(tuple(curve), unit, title)
    return files


def export_card(base_model: Mapping[str, Any], what: str, use: str) -> bytes:
    """The card of an exported model.

    Args:
        base_model: "name" and "revision", as config.json stores them.
        what: description of the files.
        use: how to run the files, in Markdown.
    """
    name = str(base_model.get("name", ""))
    template = str(_templates() / "export.md")
    base = {} if Path(name).is_absolute() else {"base_model": name}
    fields: dict[str, Any] = {**base_license(base_model), **base, "tags": _TAGS}
    data = ModelCardData(**fields)
    card = ModelCard.from_template(data, template_path=template, title=Path(name).name, what=what, use=use)
    return str(card.content).encode()


def base_license(base_model: Mapping[str, Any]) -> dict[str, Any]:
    """The license fields of the base's own card or config; empty if its files are not on this machine.

    Args:
        base_model: "name", a folder or Hub name, and "revision", as config.json stores them.
    """
    name, revision = str(base_model.get("name", "")), base_model.get("revision")
    for file in (CARD, "config.json"):
        local = Path(name).is_absolute()
        path = Path(name) / file if local else try_to_load_from_cache(name, file, revision=revision)
        found = license_of(_stated(Path(path))) if isinstance(path, str | Path) and Path(path).is_file() else {}
        if found:
            return found
    return {}


def license_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The license fields in a card's metadata; empty if it states no license."""
    return {key: metadata[key] for key in _LICENSE if metadata.get(key)} if metadata.get("license") else {}


def _stated(file: Path) -> dict[str, Any]:
    """The metadata of a card, or the fields of a config. A damaged file gives none, because glowq did not write it."""
    try:
        return read_json(file) if file.suffix == ".json" else metadata_load(file) or {}
    except (GlowQError, ValueError, YAMLError):
        return {}


def _metadata(name: str, title: str, figures: Mapping[str, Any] | None, license: Mapping[str, Any]) -> ModelCardData:
    """The metadata that the Hub indexes. A base in a local folder is left out: its name has no meaning for others."""
    base = {} if Path(name).is_absolute() else {"base_model": name, "base_model_relation": "quantized"}
    results = _results(figures)
    measured = {"model_name": title, "eval_results": results, "pipeline_tag": "text-generation"} if results else {}
    fields: dict[str, Any] = {**license, **base, "library_name": "glowq", "tags": _TAGS, **measured}
    return ModelCardData(**fields)


def _templates() -> Path:
    """The folder of the templates: inside the package in a wheel, beside the package in a checkout."""
    inside = Path(__file__).parents[1] / "model_cards"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "model_cards"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "no"


def _improvement(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    low, high = interval_ends(found)
    means = {name: f"{found[name]:.4g}" for name in ("quantized", "corrected")}
    return {"tokens": _count(found["tokens"]), **means, "low": low, "high": high, "better": is_better(found)}


def _held_out(figures: Mapping[str, Any] | None) -> dict[str, str] | None:
    """The figures as text; None if nothing was measured."""
    if not figures or figures.get("reference") is None:
        return None
    perplexities = {name: shown(figures[name], ".4f") for name in _PERPLEXITIES}
    return {**perplexities, "recovered": shown_share(figures), "tokens": _count(figures.get("tokens"))}


def _rounding(figures: Mapping[str, Any] | None) -> dict[str, str] | None:
    """The shares of the divergence undone with and without rounding, as text; None if not measured."""
    shares = undone(figures)
    if figures is None or shares is None:
        return None
    return {**{name: f"{share:.1%}" for name, share in shares.items()}, "tokens": _count(figures["tokens"])}


def _results(figures: Mapping[str, Any] | None) -> list[EvalResult]:
    """The measured figures in the Hub's format, without undefined figures and without a meaningless share."""
    if not figures or figures.get("reference") is None:
        return []
    values = {("perplexity", f"Perplexity, {what}"): figures[name] for name, what in _PERPLEXITIES.items()}
    if has_gap(figures["reference"], figures["quantized"]) and figures.get("recovered_ci95") is not None:
        values["recovered", "Share of the perplexity gap recovered"] = figures["recovered"]
    text: dict[str, Any] = {"dataset_type": "held-out-text", "dataset_name": "Held out from the calibration text"}
    return [
        EvalResult(task_type="text-generation", metric_type=kind, metric_name=name, metric_value=value, **text)
        for (kind, name), value in values.items()
        if value is not None and math.isfinite(value)
    ]


def _rows(curve: Sequence[CurvePoint]) -> list[dict[str, str]]:
    return [
        {
            "bytes": f"{point.bytes:,}",
            "share": f"{100 * point.share_of_base:.3g}%",
            "predicted": f"{point.predicted:.1%}",
        }
        for point in curve
    ]


@lru_cache(maxsize=8)
def _picture(curve: tuple[CurvePoint, ...], unit: str, title: str) -> bytes:
    """The plot as a PNG. It is kept, because saving a correction and pushing it take the same one."""
    file = io.BytesIO()
    draw_budgets(file, curve, unit, title)
    return file.getvalue()
