"""What every exporter needs: load a corrected model by name, run it once, and compare outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...artifact.config import GlowQConfig
from ...errors import ExportError
from ...models.fast_products import fast_products
from ...models.loading import load_config, load_model
from ...quantizers.experts import ExpertLinear
from ...runtime.attach import attached

__all__ = ["difference", "first_output", "load_corrected", "refuse_experts", "stored_correction"]


def stored_correction(source: str) -> GlowQConfig:
    """The glowq config in config.json of a corrected model, in either saved form; no weight is read.

    Raises:
        ExportError: the model carries no correction.
    """
    stored = getattr(load_config(source), "quantization_config", None)
    if not isinstance(stored, dict) or stored.get("quant_method") != "glowq":
        raise ExportError(
            f"{source} carries no glowq correction; expected the folder or Hub name of one that `glowq correct` wrote."
        )
    config: GlowQConfig = GlowQConfig.from_dict(stored)
    return config


def load_corrected(source: str) -> Any:
    """Load a corrected model, in either saved form, ready to run.

    Raises:
        ExportError: the model carries no correction.
    """
    stored_correction(source)
    return load_model(source, load_config(source))


def refuse_experts(model: nn.Module, cannot: str) -> None:
    """Refuse a correction of experts whose matrices are stacked in one parameter.

    Args:
        model: a corrected model.
        cannot: why they cannot be exported, as a clause.

    Raises:
        ExportError: a group has such experts.
    """
    members = [member for container in attached(model).values() for member in container.group.members]
    found = next((name for name in members if isinstance(model.get_submodule(name), ExpertLinear)), None)
    if found is not None:
        raise ExportError(
            f"{found} is corrected, and is a part of a parameter that holds the matrices of all experts: {cannot}. "
            "Export with --to merged, or load the corrected model with transformers."
        )


def first_output(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The first output of a forward (logits, or an encoder's hidden states), float32 on the CPU."""
    with torch.no_grad(), fast_products(model):
        found: Tensor = model(**inputs)[0]
    return found.float().cpu()


def difference(found: Tensor, expected: Tensor) -> dict[str, float]:
    """The difference between computed and expected outputs.

    Args:
        found, expected: same shape, float.

    Returns:
        "max_difference", the largest absolute difference, and "relative_difference", the root mean square of the
        difference divided by the root mean square of `expected`.
    """
    gap = (found.double() - expected.double()).abs()
    scale = expected.double().square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return {"max_difference": float(gap.max()), "relative_difference": float(gap.square().mean().sqrt() / scale)}
