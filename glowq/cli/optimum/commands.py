"""glowq's commands in optimum-cli: `optimum-cli export glowq` and `optimum-cli glowq`.

In an installed glowq, this file is `optimum/commands/register/register_glowq.py`. optimum-cli imports it at every
start, so it imports of glowq only what declares options: no torch and no transformers.
"""

from __future__ import annotations

import argparse
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

__all__ = ["REGISTER_COMMANDS"]


class GlowQExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """`optimum-cli export glowq`: does the same as `glowq correct`."""

    COMMAND = CommandInfo(name="glowq", help="Give a quantized model its accuracy back with low-rank correction.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare the options of `glowq correct`."""
        try:
            from glowq.cli.optimum.arguments import add_arguments
        except Exception as error:  # a broken glowq must not stop the other commands of optimum-cli, which get here too
            broken = error

            def refuse(*args: Any, **kwargs: Any) -> Any:
                raise broken

            parser.parse_known_args = refuse  # type: ignore[method-assign]
            return
        add_arguments(parser)

    def run(self) -> None:
        """Correct and save a model like `glowq correct`, with the same exit status."""
        options = {name: value for name, value in vars(self.args).items() if name != "func"}
        from glowq.cli.optimum.export import export

        export(**options)


class _SavedModelCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("model", help="Folder or Hub name.")
        parser.add_argument(
            "--json", action="store_true", help="Print one JSON object on stdout, everything else on stderr."
        )

    def run(self) -> None:
        from glowq.cli.app import app

        app([self.COMMAND.name, self.args.model, *(["--json"] if self.args.json else [])])


class GlowQCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """`optimum-cli glowq`: the commands of `glowq` that inspect or verify a saved model."""

    COMMAND = CommandInfo(name="glowq", help="Inspect and verify corrected models.")
    SUBCOMMANDS = (
        CommandInfo("inspect", "Show what a model is and what can be corrected.", _SavedModelCommand),
        CommandInfo("verify", "Load a corrected model and check that it is complete.", _SavedModelCommand),
    )


REGISTER_COMMANDS = [GlowQCommand, (GlowQExportCommand, ExportCommand)]
