"""`glowq export`: write a corrected model in another project's format."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from ...errors import ConfigError
from ...utils.names import unknown_export
from ..options import EXPORT_NAMES, JsonOption
from ..output import command_line, grid, session

__all__ = ["export"]


def _check_target(value: str) -> str:
    if value not in EXPORT_NAMES:
        raise typer.BadParameter(unknown_export(value, EXPORT_NAMES))
    return value


def export(
    model: Annotated[str, typer.Argument(metavar="OUT", help="Folder or Hub name of a corrected model, either form.")],
    to: Annotated[
        str,
        typer.Option(
            callback=_check_target,
            help="peft, onnx, or merged (a dense model with the correction in its weights).",
        ),
    ],
    output: Annotated[str, typer.Option(metavar="DIR", help="Folder to write; must be new, empty, or an old export.")],
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="merged: dtype of the weights; bfloat16 by default."),
    ] = None,
    pad_ranks: Annotated[
        bool,
        typer.Option("--pad-ranks", help="peft: fill all modules up to one rank with zeros (for SGLang, vLLM)."),
    ] = False,
    fill_modules: Annotated[
        bool, typer.Option("--fill-modules", help="peft: write zeros for uncorrected modules (for GPTQModel).")
    ] = False,
    max_rank: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="peft: largest rank that the engine can load; a larger one is refused."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="peft: folder or Hub name of the base, if not the one in the correction."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write a corrected model for another program, and compare the result with the corrected model.

    \b
    Examples:
      glowq export corrected --to peft --output adapter
      glowq export corrected --to onnx --output onnx
      glowq export corrected --to merged --output dense
    """
    given: dict[str, Any] = {
        "base_model": base_model,
        "dtype": dtype,
        "fill_modules": fill_modules,
        "max_rank": max_rank,
        "pad_ranks": pad_ranks,
    }
    options = {name: value for name, value in given.items() if value is not None and value is not False}
    from ...integrations.export.registry import check_options
    from ...integrations.export.registry import export as export_model

    try:
        check_options(to, options)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    with session(json) as show:
        result = {**export_model(model, to, output, **options), "command": command_line()}
        show(result, lambda: _table(result))


_LABELS = {  # readable labels for figures whose names are too short
    "max_difference": "check: largest difference of an output",
    "relative_difference": "check: root mean square difference, as a share of the outputs",
    "tolerance": "check: largest allowed share",
    "weight_error": "check: largest error of a weight, as a share of what rounding allows",
    "kernel_difference": "float32 against the base's own kernels, as a share of the outputs",
}


def _table(result: dict[str, Any]) -> Any:
    shown = {"output": result["output"], "files": f"{len(result['files'])}, {result['bytes']:,} bytes"}
    facts = {name: value for name, value in result.items() if name not in ("to", "output", "files", "bytes", "command")}
    for name, value in {**facts, **result.get("check", {})}.items():
        if not isinstance(value, dict | list):
            label = _LABELS.get(name, name.replace("_", " "))
            form = ".3g" if isinstance(value, float) else "," if name.endswith("_bytes") else ""
            shown[label] = format(value, form)
    return grid(shown)
