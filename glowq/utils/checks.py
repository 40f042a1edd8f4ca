"""Checks of arguments and of stored fields. Every error message names the field."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

__all__ = ["check_amount", "check_int", "json_object"]


def check_int(name: str, value: Any, least: int, *, optional: bool = False) -> None:
    """Raise an error unless `value` is a whole number of at least `least`; None is valid too if `optional` is True.

    Raises:
        ConfigError: the message names the field.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, found {value!r}.")


def check_amount(name: str, value: Any) -> None:
    """Raise an error unless `value`, a field of config.json, is a finite number of at least 0.

    Raises:
        ConfigError: the message names the field.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ConfigError(f"{name} in config.json must be a number of at least 0, found {value!r}.")


def json_object(name: str, value: Any) -> dict[str, Any]:
    """Return a copy of `value`, a field of config.json that must be a JSON object.

    Raises:
        ConfigError: the message names the field.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} in config.json must be a JSON object, found {type(value).__name__}.")
    return copy.deepcopy(dict(value))
