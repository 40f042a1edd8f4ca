"""The model card of a saved correction, from the template in `model_cards/`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .config import GlowQConfig
from .evaluation import NO_GAP, has_gap
from .runtime import GroupFactors

__all__ = ["correction_card"]


def correction_card(config: GlowQConfig, factors: Sequence[GroupFactors], base_bytes: int) -> str:
    """Text of README.md: metadata, what was corrected, what was measured, how to load it.

    Args:
        config: its provenance may hold "command" (the exact command line) and "held_out" (the figures of
            `glowq correct --json`); sections without data are left out. Nothing in it depends on time or machine.
        factors: one entry a restored group.
        base_bytes: bytes of the quantized weights.
    """
    factor_bytes = sum(entry.factor_bytes for entry in factors)
    base_model: dict[str, Any] = config.base_model or {}
    name = str(base_model.get("name", ""))
    ranks = sorted({entry.rank for entry in factors})
    data = ModelCardData(
        base_model=None if Path(name).is_absolute() else name,
        base_model_relation=None if Path(name).is_absolute() else "quantized",
        library_name="glowq",
        tags=["glowq", "quantized", "low-rank-correction"],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_templates() / "correction.md"),
        full=config.format == "full",
        title=f"{Path(name).name}, corrected by glowq",
        base_model_name=Path(name).name if Path(name).is_absolute() else name,
        revision=base_model.get("revision"),
        base=_base_name(config.base),
        method=config.method,
        seed=config.seed,
        group_count=len(factors),
        module_count=sum(len(entry.group.members) for entry in factors),
        ranks=str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        factor_bytes=factor_bytes,
        overhead=f"{factor_bytes / base_bytes:.2%}",
        calibration_tokens=config.provenance.get("calibration_tokens", "no"),
        held_out=_held_out(config.provenance.get("held_out")),
        command=config.provenance.get("command"),
        repository="this/repository",
    )
    return str(card.content)


def _templates() -> Path:
    """In a wheel the templates lie inside the package, in a checkout beside it."""
    inside = Path(__file__).parent / "model_cards"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "model_cards"


def _base_name(base: Any) -> str:
    method = getattr(base, "quant_method", None)
    return str(getattr(method, "value", method))


def _held_out(figures: dict[str, Any] | None) -> dict[str, str] | None:
    """The figures as shown; one that is undefined, and a share of hardly any gap, say so."""
    if not figures or figures.get("reference") is None:
        return None
    names = ("reference", "quantized", "corrected")
    shown = {name: "undefined" if figures[name] is None else f"{figures[name]:.4f}" for name in names}
    share = figures.get("recovered")
    if not has_gap(figures["reference"], figures["quantized"]):
        return {**shown, "recovered": NO_GAP}
    share_shown = "undefined" if share is None else f"{share:.1%}"
    if figures.get("recovered_ci95") is None:
        share_shown = f"too few tokens to tell ({share_shown})"
    return {**shown, "recovered": share_shown}
