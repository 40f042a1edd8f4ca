"""`glowq verify`: load a saved correction, check that it was made for its base's weights, and run the model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ...errors import ConfigError
from ..options import JsonOption
from ..output import command_line, grid, session

__all__ = ["verify"]


def verify(
    model: Annotated[str, typer.Argument(metavar="OUT", help="Folder or Hub name of a corrected model, either form.")],
    headers: Annotated[
        bool, typer.Option("--headers", help="Check config.json and the headers alone: no weight, no base, no forward.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Load a corrected model and check that it is complete: no factor missing, all finite, made for these weights.

    The model is run on a few random tokens: its answers must change by as much as when it was corrected.

    With --headers, nothing is loaded: a torn download is found in a second, values that were changed are not.

    \b
    Examples:
      glowq verify corrected
      glowq verify org/model-glowq --headers
    """
    with session(json) as show:
        facts = _of_headers(model) if headers else _of_the_model(model)
        result = {"model": model, **facts, "headers_only": headers, "command": command_line()}
        show(result, lambda: _table(result))


def _of_headers(model: str) -> dict[str, Any]:
    from ...artifact.factor_headers import read_stored
    from ...models.headers import read_headers

    found = read_headers(model)
    _refuse_another(model, found.config.get("quantization_config"))
    config, factors = read_stored(model, found)
    base: Any = config.base_model
    return {
        "groups": len(factors.group_gains),
        "factor_bytes": factors.factor_bytes,
        "base_model": base["name"],
        "fingerprint": base["fingerprint"],
    }


def _of_the_model(model: str) -> dict[str, Any]:
    from ...models.loading import load_config, load_model

    config = load_config(model)
    _refuse_another(model, getattr(config, "quantization_config", None))
    loaded = load_model(model, config)  # checks the factors, and the fingerprint of the base's weights
    return {**_facts(loaded), **_change(loaded)}


def _refuse_another(model: str, stored: Any) -> None:
    if not isinstance(stored, dict) or stored.get("quant_method") != "glowq":
        raise ConfigError(f"{model} carries no glowq correction: there is nothing to verify. Correct it first.")


def _facts(model: Any) -> dict[str, Any]:
    from ...runtime.attach import attached_factors

    factors, config = attached_factors(model), model.config.quantization_config
    return {
        "groups": len(factors),
        "factor_bytes": sum(entry.factor_bytes for entry in factors),
        "base_model": config.base_model["name"],
        "fingerprint": config.base_model["fingerprint"],
    }


def _change(model: Any) -> dict[str, Any]:
    from ...evaluation.change import answer_change, check_change

    found, recorded = answer_change(model), model.config.quantization_config.provenance.change
    if found is not None and recorded is not None:
        check_change(found, recorded)
    return {"change": found, "recorded_change": recorded}


def _table(result: dict[str, Any]) -> Any:
    made_for = f"{result['base_model']}, {_shortened(result['fingerprint'])}"
    factors = f"{result['groups']} groups, {result['factor_bytes']:,} bytes"
    if result["headers_only"]:
        seen = {"made for": f"{made_for} (not loaded)", "factors": f"{factors}, complete by their headers"}
    else:
        answers = _words(result["change"], result["recorded_change"])
        seen = {"made for": f"{made_for}: these weights", "factors": f"{factors}, all finite", "answers": answers}
    return grid({"model": result["model"], **seen})


def _shortened(fingerprint: str) -> str:
    """A fingerprint with its first twelve digits, for people to read."""
    kind, _, digits = fingerprint.partition(":")
    return f"{kind}:{digits[:12]}..."


def _words(found: float | None, recorded: float | None) -> str:
    if found is None:
        return "not compared: it takes more than token ids, or returns neither logits nor final states"
    known = "when it was made that was not recorded" if recorded is None else f"{recorded:.3g} when it was made"
    return f"the correction changes its answers by {found:.3g} ({known})"
