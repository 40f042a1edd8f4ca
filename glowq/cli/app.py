"""The `glowq` command. Each subcommand is a small file that calls the same functions as a Python user."""

from __future__ import annotations

from typing import Annotated

import typer

from .commands.bench import bench
from .commands.compare import compare
from .commands.correct import correct
from .commands.evaluate import evaluate
from .commands.export import export
from .commands.groups import groups
from .commands.import_ import import_
from .commands.inspect import inspect
from .commands.push import push
from .commands.run import run
from .commands.select import select
from .commands.verify import verify

__all__ = ["app"]

_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # keeps the examples in one piece, so that they can be copied
    context_settings=_HELP,
)
app.command("bench")(bench)
app.command("compare")(compare)
app.command("correct")(correct)
app.command("evaluate")(evaluate)
app.command("export")(export)
app.command("groups")(groups)
app.command("import")(import_)
app.command("inspect")(inspect)
app.command("push")(push)
app.command("select")(select)
app.command("verify")(verify)
# Everything after the program's name belongs to the program, including --help.
app.command("run", context_settings={**_HELP, "allow_interspersed_args": False})(run)


def _show_version(value: bool) -> None:
    if value:
        from .._version import __version__

        typer.echo(f"glowq {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Give quantized language models their accuracy back with group-shared low-rank correction.

    Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted by Ctrl-C.
    """
