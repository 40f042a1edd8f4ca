"""`glowq groups`: which modules of a model read the same tensor."""

from __future__ import annotations

from typing import Any

from ...models.loading import load_config, load_model
from ..options import JsonOption, ModelArgument
from ..output import session

__all__ = ["groups"]


def groups(model: ModelArgument, json: JsonOption = False) -> None:
    """Show the groups of a model, quantized or not. They are found by tracing one forward.

    \b
    Example:
      glowq groups org/model
    """
    with session(json) as show:
        from ...models.forward import example_inputs
        from ...models.tracing import trace_groups

        loaded = load_model(model, load_config(model))
        trace = trace_groups(loaded, example_inputs(loaded))
        result = {
            "model": model,
            "groups": [
                {
                    "name": group.name,
                    "members": list(group.members),
                    "in_features": group.in_features,
                    "out_features": list(group.out_features),
                    "block": group.block,
                }
                for group in trace.groups
            ],
            "skipped": trace.skipped,
        }
        show(result, lambda: _tables(result))


def _tables(result: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table

    table = Table(title=f"{len(result['groups'])} groups of {result['model']}", title_justify="left")
    for heading in ("group", "in", "out"):
        table.add_column(heading, overflow="fold", justify="left" if heading == "group" else "right")
    for group in result["groups"]:
        table.add_row(group["name"], str(group["in_features"]), " + ".join(map(str, group["out_features"])))
    if not result["skipped"]:
        return table
    skipped = Table(title="left out", title_justify="left")
    skipped.add_column("module", overflow="fold")
    skipped.add_column("reason", overflow="fold")
    for name, reason in result["skipped"].items():
        skipped.add_row(name, reason)
    return Group(table, skipped)
