"""glowq's commands in optimum-cli: `optimum-cli export glowq` and `optimum-cli glowq`.

In an installed glowq this file is `optimum/commands/register/register_glowq.py`, which optimum-cli imports whenever it
is started. So it imports nothing of glowq before a command of glowq's is run.
"""

from __future__ import annotations

import argparse
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

__all__ = ["REGISTER_COMMANDS"]


class GlowQExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """`optimum-cli export glowq`: the same step as `glowq correct`."""

    COMMAND = CommandInfo(name="glowq", help="Give a quantized model its accuracy back with low-rank correction.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Options that are not given are not passed on: their defaults are those of `glowq correct`."""

        def option(*names: str, **settings: Any) -> None:
            parser.add_argument(*names, default=argparse.SUPPRESS, **settings)

        parser.add_argument("-m", "--model", required=True, help="Folder or Hub name of a model.")
        parser.add_argument("--calibration", required=True, help="Text: a file, a folder, or a datasets name.")
        option("--task", help="text-generation or feature-extraction; else what the model's config.json names.")
        option("--base", help="Quantizer, for example nf4 or torchao-int4; left out for a model that is quantized.")
        option("--reference", help="Full-precision model; MODEL unless that is quantized already.")
        option("--rank", type=int, help="Rank of every group; 32 if no budget is given.")
        option("--budget", help="Bytes to spend: 1.5%%, 200MB, or 'recover 80%%'.")
        option("--rank-step", type=int, help="A budget gives ranks in multiples of this.")
        option("--max-rank", type=int, help="A budget gives no group more ranks.")
        option("--method", help="Solver method; see `glowq correct --help`.")
        option("--format", choices=["correction", "full"], help="A small correction, or the model in one piece.")
        option("--calibration-tokens", type=int, help="Tokens used; an eighth is held out.")
        option("--sequence-length", type=int, help="Tokens a sequence.")
        option("--distill", type=int, help="Steps of gradient descent on the chosen factors.")
        option("--factor-dtype", choices=["auto", "int8"], help="int8: a byte a value, twice the ranks for the bytes.")
        option("--seed", type=int, help="Seed of everything drawn at random.")
        option("--gguf-file", help="GGUF file in MODEL, with --base dense.")
        option("--resume", action="store_true", help="Keep finished blocks in OUTPUT.resume.")
        parser.add_argument("--json", action="store_true", help="Print one JSON object on stdout, all else on stderr.")
        parser.add_argument("output", help="Folder to write; must be new, empty, or an old result.")

    def run(self) -> None:
        """Correct and save, as `glowq correct` does; the exit status is its, too."""
        options = {name: value for name, value in vars(self.args).items() if name != "func"}
        from glowq.cli.optimum.export import export

        export(**options)


class _SavedModelCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("model", help="Folder or Hub name.")
        parser.add_argument("--json", action="store_true", help="Print one JSON object on stdout, all else on stderr.")

    def run(self) -> None:
        from glowq.cli.app import app

        app([self.COMMAND.name, self.args.model, *(["--json"] if self.args.json else [])])


class GlowQCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """`optimum-cli glowq`: the commands of `glowq` that look at a saved model."""

    COMMAND = CommandInfo(name="glowq", help="Inspect and verify corrected models.")
    SUBCOMMANDS = (
        CommandInfo("inspect", "Show what a model is and what can be corrected.", _SavedModelCommand),
        CommandInfo("verify", "Load a corrected model and check that it is whole.", _SavedModelCommand),
    )


REGISTER_COMMANDS = [GlowQCommand, (GlowQExportCommand, ExportCommand)]
