"""Checks of arguments whose messages name the field."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError

__all__ = ["check_int"]


def check_int(name: str, value: Any, least: int, *, optional: bool = False) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
        ConfigError: the message names the field.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, found {value!r}.")
