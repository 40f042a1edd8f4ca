"""Functions of all commands: run a command, print its result or its error, format tables."""

from __future__ import annotations

import json
import os
import shlex
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import typer

from ..errors import GlowQError, one_line
from ..utils.logging import quiet

__all__ = [
    "command_line",
    "grid",
    "markdown_table",
    "note",
    "peak_rss_bytes",
    "session",
    "table",
    "visible",
]

Show = Callable[[dict[str, Any], Callable[[], Any]], None]

_WIDTH = 160  # width of tables that are not printed to a terminal


@contextmanager
def session(as_json: bool) -> Iterator[Show]:
    """Run a command. Only its result is printed to stdout.

    A `GlowQError` ends it with one line and status 1. `glowq.cli.entry` ends it after Ctrl-C.

    Args:
        as_json: print the result as JSON, not as tables.

    Yields:
        show(result, render): call it once at the end; `render` returns the tables that rich prints.
    """
    results: list[tuple[dict[str, Any], Callable[[], Any]]] = []
    try:
        with _stdout_to_stderr(), quiet("bitsandbytes"):
            _quiet_progress_bars()
            yield lambda result, render: results.append((result, render))
    except GlowQError as error:
        _say(f"error: {one_line(error)}")
        raise typer.Exit(1) from error
    except Exception as error:
        _refuse_full(error, getattr(error, "filename", None) or "a file that the command needs")
        raise
    try:
        for result, render in results:
            if as_json:
                print(json.dumps(result, indent=2, allow_nan=False))
            else:
                _print_rich(render())
        sys.stdout.flush()
    except OSError as error:
        if sys.stdout is sys.__stdout__:  # otherwise Python tries to write the rest again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _refuse_full(error, "the result to the standard output")
        raise


def _refuse_full(error: Exception, what: object) -> None:
    """End the command with one line if `error` says that the disk is full; `what` could not be written."""
    from ..utils.output import is_full

    if is_full(error):
        print(f"glowq: error: cannot write {what}: the disk is full.", file=sys.stderr)
        raise typer.Exit(1) from error


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send everything that libraries print, including C libraries, to stderr."""
    stdout: TextIO = sys.stdout
    if stdout != sys.__stdout__:
        with redirect_stdout(sys.stderr):
            yield
        return
    stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def _quiet_progress_bars() -> None:
    if not sys.stderr.isatty():
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()  # transformers reads this setting when it is imported; not every command imports it
        if "transformers.utils.logging" in sys.modules:
            sys.modules["transformers.utils.logging"].disable_progress_bar()


def visible(text: str) -> str:
    """The text with its control characters written out, as in "\\x1b[31m"; line breaks and tabs stay.

    Names and figures come from files of strangers, and a terminal obeys what it is sent: an escape sequence can change
    its title, or hide and imitate lines.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if _is_harmless(letter) else letter.encode("unicode_escape").decode() for letter in text)


def _is_harmless(letter: str) -> bool:
    # Control and format characters (which reverse the direction of text), lone surrogates, and other line breaks.
    return letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def note(text: str) -> None:
    """Print one line to stderr about something that the user should know."""
    _say(f"note: {text}")


def _say(text: str) -> None:
    print(visible(f"glowq: {text}"), file=sys.stderr)


def _print_rich(renderable: Any) -> None:
    from rich.console import Console

    class Plain(Console):
        """Prints every text as it is: names may hold brackets and colons, which are neither markup nor emoji."""

        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(visible(text), **{**options, "markup": False, "emoji": False})

    width = None if sys.stdout.isatty() else _WIDTH
    Plain(width=width, highlight=False, markup=False, emoji=False).print(renderable)


def command_line(output: str | None = None, shown: str = "OUT") -> str:
    """The command as it was typed, quoted for a shell.

    Args:
        output: the output folder, if the command is to be stored. It is replaced with `shown`, so that the written
            files do not depend on its name. Of other paths outside of the working directory only the last part is kept:
            a published model must not tell where its maker keeps files.
        shown: the replacement.
    """
    program = "optimum-cli" if os.path.basename(sys.argv[0]) == "optimum-cli" else "glowq"
    arguments = sys.argv[1:]
    for place in reversed(range(len(arguments)) if output is not None else ()):
        # A model, a quantizer or the command can have the same name as the folder, so check where the argument stands.
        option = place > 0 and arguments[place - 1] == "--output"
        if arguments[place] == f"--output={output}":
            arguments[place] = f"--output={shown}"
        elif arguments[place] == output and (option or program == "optimum-cli"):
            arguments[place] = shown
        else:
            continue
        break
    if output is not None:
        arguments = [_without_folders(argument) for argument in arguments]
    return shlex.join([program, *arguments])


def _without_folders(argument: str) -> str:
    option, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{','.join(map(_last_part, value.split(',')))}"  # several texts are separated by commas


def _last_part(value: str) -> str:
    path = Path(value)
    outside = path.is_absolute() or value.startswith("~") or ".." in path.parts
    return path.name if outside and path.name else value


def grid(rows: Mapping[str, Any]) -> Any:
    """A table of two columns, name and value."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str] = ()) -> Any:
    """A table for a terminal. The columns named in `left` are aligned to the left, all others to the right."""
    from rich.table import Table

    found = Table(title=title, title_justify="left")
    for heading in headings:
        found.add_column(heading, justify="left" if heading in left else "right")
    for row in rows:
        found.add_row(*row)
    return found


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [f"| {' | '.join(row)} |" for row in (headings, ("---",) * len(headings), *rows)]


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
