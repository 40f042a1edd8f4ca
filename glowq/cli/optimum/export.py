"""The function that `optimum-cli export glowq` runs: `glowq correct` with optimum's names of options."""

from __future__ import annotations

import sys
from typing import Any

import typer

from ..commands.correct import report
from ..entry import interrupted
from ..options import distill_steps

__all__ = ["export"]


def export(model: str, output: str, json: bool, task: str = "auto", **options: Any) -> None:
    """Run `glowq.integrations.optimum.main_export`, and print and exit like `glowq correct`."""

    def run(command: str) -> dict[str, Any]:
        from ...integrations.optimum import main_export

        if "distill" in options:
            options["distill"] = distill_steps(options["distill"])
        return main_export(model, output, task=task, command=command, **options)

    try:
        report(run, model, output, json)
    except KeyboardInterrupt:
        sys.exit(interrupted())
    except typer.Exit as ending:  # only typer's own commands turn it into an exit status
        sys.exit(ending.exit_code)
