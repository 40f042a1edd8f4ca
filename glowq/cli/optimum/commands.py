"""glowq's commands in optimum-cli: `optimum-cli export glowq` and `optimum-cli glowq`.

In an installed glowq, this file is `optimum/commands/register/register_glowq.py`. optimum-cli imports it at every
start, so it imports glowq only when one of glowq's commands is run.
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
        """Declare the options. Options that are not given are not passed on: the defaults of `glowq correct` apply."""

        def option(*names: str, **settings: Any) -> None:
            parser.add_argument(*names, default=argparse.SUPPRESS, **settings)

        parser.add_argument("-m", "--model", required=True, help="Folder or Hub name of a model.")
        parser.add_argument("--calibration", required=True, help="Text: a file, a folder, or a datasets name.")
        option("--task", help="text-generation or feature-extraction; by default from the model's config.json.")
        option("--base", help="Quantizer, for example nf4 or torchao-int4; left out for a model that is quantized.")
        option("--reference", help="Full-precision model; by default MODEL, if MODEL is not quantized.")
        option("--rank", type=int, help="Rank of every group; 32 if no budget is given.")
        option("--budget", help="Bytes for the factors: 1.5%%, 200MB, or 'recover 80%%'.")
        option("--rank-step", type=int, help="A budget gives ranks in multiples of this.")
        option("--max-rank", type=int, help="Largest rank that a budget gives a group.")
        option("--method", help="Solver method; see `glowq correct --help`.")
        option("--format", choices=["correction", "full"], help="The factors only, or the whole corrected model.")
        option("--calibration-tokens", type=int, help="Tokens to use; an eighth is held out.")
        option("--sequence-length", type=int, help="Tokens per sequence.")
        option("--distill", type=int, help="Steps of gradient descent on the chosen factors.")
        option("--factor-dtype", choices=["auto", "int8"], help="int8: one byte per value, so twice the ranks.")
        option("--seed", type=int, help="Seed of everything drawn at random.")
        option("--gguf-file", help="GGUF file in MODEL, with --base dense.")
        option("--resume", action="store_true", help="Keep finished blocks in OUTPUT.resume.")
        parser.add_argument(
            "--json", action="store_true", help="Print one JSON object on stdout, everything else on stderr."
        )
        parser.add_argument("output", help="Folder to write; must be new, empty, or an old result.")

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
