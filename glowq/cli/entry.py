"""Entry point of the `glowq` command: Ctrl-C ends it with one line and status 130, also while it is importing."""

from __future__ import annotations

import signal
import sys

__all__ = ["interrupted", "main"]


def main() -> None:
    """Run the `glowq` command, and exit."""
    try:
        from .app import app

        app(prog_name="glowq")
    except KeyboardInterrupt:  # before typer was there to catch it
        sys.exit(interrupted())
    except SystemExit as ending:
        if _was_interrupted(ending):
            interrupted()
        raise


def _was_interrupted(ending: SystemExit) -> bool:
    """Whether typer made this of a Ctrl-C: it exits with status 130, and prints nothing."""
    cause: BaseException | None = ending
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return ending.code == 130 and cause is not None


def interrupted() -> int:
    """Say on stderr that the user interrupted the program, and return its exit status.

    A second Ctrl-C ends the process at once, and prints nothing.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("glowq: interrupted", file=sys.stderr)
    return 130
