"""The options of `optimum-cli export glowq`: those of `glowq correct`, in the form of argparse."""

from __future__ import annotations

import argparse
from inspect import Parameter, signature
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..commands.correct import correct

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `-m`, `--task` and OUTPUT as other exporters of optimum do, and every other option of `glowq correct`.

    Options that are not given are not passed on, so that the defaults of `glowq correct` apply.
    """
    parser.add_argument("-m", "--model", required=True, help="Folder or Hub name of a model.")
    task = "text-generation or feature-extraction; by default from the model's config.json."
    parser.add_argument("--task", default=argparse.SUPPRESS, help=task)
    hints = get_type_hints(correct, include_extras=True)
    for name, parameter in signature(correct).parameters.items():
        if name not in ("model", "output", "json"):
            annotation, option = get_args(hints[name])
            settings = _settings(annotation, option, parameter.default is Parameter.empty)
            parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    parser.add_argument("--json", action="store_true", help=get_args(hints["json"])[1].help)
    parser.add_argument("output", help=get_args(hints["output"])[1].help)


def _settings(annotation: Any, option: Any, required: bool) -> dict[str, Any]:
    """Arguments of `add_argument` for a type (`int | None`, `Literal[...]`, `bool`, ...) and its typer option."""
    kinds = [annotation] if get_origin(annotation) is Literal else get_args(annotation) or [annotation]
    kind = next(kind for kind in kinds if kind is not NoneType)
    settings = {"default": argparse.SUPPRESS, "help": option.help.replace("%", "%%")}
    if kind is bool:
        return {**settings, "action": "store_true"}
    if get_origin(kind) is Literal:
        return {**settings, "choices": get_args(kind), "required": required}
    return {**settings, "type": kind, "metavar": option.metavar, "required": required}
