"""`glowq run`: run any Python program after glowq is registered in transformers."""

from __future__ import annotations

import os
import runpy
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from ...errors import ModelNotFoundError
from ..output import session

__all__ = ["run"]


def run(
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="A script, or a module's name after -m.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS", help="Arguments of the program.")] = None,
    module: Annotated[bool, typer.Option("-m", help="PROGRAM is a module, as in python -m.")] = False,
) -> None:
    """Run a program with glowq imported, so that it loads corrected models like any other.

    \b
    Example:
      glowq run -m lm_eval --model hf --model_args pretrained=corrected --tasks arc_easy
    """
    with session(False):
        sys.path.insert(0, os.getcwd() if module else os.path.dirname(os.path.abspath(program)))
        _check(program, module)
    # Outside of the session, so that the program's exit code and exceptions are not caught.
    sys.argv = [program, *(arguments or [])]
    if module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")


def _check(program: str, module: bool) -> None:
    if not module and not os.path.exists(program):
        raise ModelNotFoundError(f"no script {program!r}; for a module write: glowq run -m {program}")
    if module:
        try:
            found = find_spec(program)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise ModelNotFoundError(f"no module {program!r} can be imported here; for a script leave out -m.")
