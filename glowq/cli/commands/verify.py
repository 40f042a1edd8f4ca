"""`glowq verify`: load a saved correction, check that it was made for its base's weights, and run the model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ...errors import ConfigError, NonFiniteError
from ...models.loading import load_config, load_model
from ..options import JsonOption
from ..output import command_line, grid, session

__all__ = ["verify"]

_SHAPE = (2, 16)  # shape of the token ids that the model is run on


def verify(
    model: Annotated[str, typer.Argument(metavar="OUT", help="Folder or Hub name of a corrected model, either form.")],
    json: JsonOption = False,
) -> None:
    """Load a corrected model and check that it is complete: no factor missing, all finite, made for these weights.

    \b
    Example:
      glowq verify corrected
    """
    with session(json) as show:
        config = load_config(model)
        stored = getattr(config, "quantization_config", None)
        if not isinstance(stored, dict) or stored.get("quant_method") != "glowq":
            raise ConfigError(f"{model} carries no glowq correction: there is nothing to verify. Correct it first.")
        loaded = load_model(model, config)  # checks the factors, and the fingerprint of the base's weights
        result = {"model": model, **_facts(loaded), **_run(model, loaded), "command": command_line()}
        show(result, lambda: _table(result))


def _facts(model: Any) -> dict[str, Any]:
    from ...runtime.attach import attached_factors

    factors, config = attached_factors(model), model.config.quantization_config
    return {
        "groups": len(factors),
        "factor_bytes": sum(entry.factor_bytes for entry in factors),
        "base_model": config.base_model["name"],
        "fingerprint": config.base_model["fingerprint"],
    }


def _run(name: str, model: Any) -> dict[str, Any]:
    """How much the correction changes the answers to random tokens, in nats or squared distance."""
    import torch

    from ...evaluation.divergence import answer, divergences
    from ...runtime.switching import disabled

    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, _SHAPE, generator=torch.Generator().manual_seed(0)).to(model.device)
    with torch.no_grad():
        corrected = answer(model(input_ids=ids))
        with disabled(model):
            plain = answer(model(input_ids=ids))
    if not all(bool(torch.isfinite(part).all()) for part in (*corrected, *plain)):
        raise NonFiniteError(f"{name} loads, but its answers hold NaN or Inf.")
    return {"change": float(divergences(plain, corrected).mean())}


def _table(result: dict[str, Any]) -> Any:
    from ...artifact.fingerprint import shortened

    return grid(
        {
            "model": result["model"],
            "made for": f"{result['base_model']}, {shortened(result['fingerprint'])}: these weights",
            "factors": f"{result['groups']} groups, {result['factor_bytes']:,} bytes, all finite",
            "runs": f"the correction changes its answers by {result['change']:.3g}",
        }
    )
