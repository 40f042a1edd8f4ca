"""Checks of arguments and of stored fields. Every error message names the field."""

from __future__ import annotations

import copy
import math
import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UnsupportedModuleError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check_amount", "check_int", "check_module", "check_text", "is_number", "json_fault", "json_object", "shown"]

_DEEPEST = 64  # levels of nested objects and lists; the config.json of real models has fewer than ten
_LARGEST = 2**63  # whole numbers below it fit into the tensors and counters that they end in


def shown(value: Any) -> str:
    """The `repr` of a value for an error message, cut to a line if it is longer."""
    try:
        return reprlib.repr(value)
    except (ValueError, RecursionError):  # Python refuses to write a whole number of more than 4,300 digits
        return f"a {type(value).__name__} too long to print"


def json_fault(value: Any) -> str | None:
    """Why a value parsed from JSON cannot be used, as the end of a sentence; None if it can.

    Values that are nested too deeply end in a RecursionError as soon as they are copied, and lone surrogates cannot be
    printed or written to a file.
    """
    left = [(value, 0)]
    while left:
        item, depth = left.pop()
        if isinstance(item, str):
            if not item.isascii() and any("\ud800" <= letter <= "\udfff" for letter in item):
                return f"holds the text {shown(item)}, which has a lone surrogate"
        elif isinstance(item, (Mapping, list, tuple)):
            if depth == _DEEPEST:
                return f"is nested more than {_DEEPEST} levels deep"
            inner = [*item.keys(), *item.values()] if isinstance(item, Mapping) else item
            left += [(each, depth + 1) for each in inner]
    return None


def check_int(name: str, value: Any, least: int, *, optional: bool = False) -> None:
    """Raise an error unless `value` is a whole number of at least `least`; None is valid too if `optional` is True.

    Raises:
        ConfigError: the message names the field.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _LARGEST:
        raise ConfigError(f"{name} must be a whole number of at least {least}, found {shown(value)}.")


def check_amount(name: str, value: Any) -> None:
    """Raise an error unless `value`, a field of config.json, is a finite number of at least 0.

    Raises:
        ConfigError: the message names the field.
    """
    if not is_number(value) or value < 0:
        raise ConfigError(f"{name} in config.json must be a number of at least 0, found {shown(value)}.")


def is_number(value: Any) -> bool:
    """Whether `value` is a whole number of at most 64 bits or a finite float; True and False are no numbers."""
    if isinstance(value, bool):
        return False
    return math.isfinite(value) if isinstance(value, float) else isinstance(value, int) and abs(value) < _LARGEST


def check_text(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise an error unless `value`, a field of config.json, is a text without NUL; None is valid if `optional`.

    Raises:
        ConfigError: the message names the field.
    """
    if value is None and optional:
        return
    if not isinstance(value, str) or "\0" in value:
        raise ConfigError(f"{name} in config.json must be a text, found {shown(value)}.")


def json_object(name: str, value: Any) -> dict[str, Any]:
    """Return a copy of `value`, a field of config.json that must be a JSON object.

    Raises:
        ConfigError: the message names the field.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} in config.json must be a JSON object, found {type(value).__name__}.")
    return copy.deepcopy(dict(value))


def check_module(model: Any) -> nn.Module:
    """Return `model`.

    Raises:
        UnsupportedModuleError: it is not a torch module.
    """
    from torch import nn

    if not isinstance(model, nn.Module):
        raise UnsupportedModuleError(
            f"expected a model in memory, got {type(model).__name__}: load it first, for example with "
            "AutoModelForCausalLM.from_pretrained."
        )
    return model
