"""Checks of the fields that config.json stores about a correction: its groups, and the name of its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError, UnsafePathError
from ..utils.checks import check_amount, check_int

__all__ = ["GROUP_FIELDS", "check_base_model", "check_group"]

GROUP_FIELDS = frozenset({"members", "in_features", "out_features", "block", "rank", "gains", "total", "sha256"})


def check_group(name: str, group: Mapping[str, Any]) -> None:
    """Refuse a group whose fields are missing, unknown or do not fit together.

    Raises:
        ConfigError: the message names the group and the field.
    """
    if set(group) - {"sha256"} != GROUP_FIELDS - {"sha256"}:
        odd = sorted((set(group) ^ GROUP_FIELDS) - {"sha256"})[0]
        raise ConfigError(f"group {name!r} in config.json: field {odd!r} is missing or unknown.")
    members, widths, gains = group["members"], group["out_features"], group["gains"]
    if not _strings(members) or not isinstance(widths, Sequence) or len(widths) != len(members) or not members:
        raise ConfigError(f"group {name!r} in config.json needs as many out_features as members.")
    for width in (group["in_features"], *widths):
        check_int(f"a width of group {name!r}", width, 1)
    check_int(f"rank of group {name!r}", group["rank"], 1)
    if not isinstance(gains, Sequence) or isinstance(gains, str) or len(gains) != group["rank"]:
        raise ConfigError(f"group {name!r} in config.json needs one gain per rank.")
    for gain in gains:
        check_amount(f"a gain of group {name!r}", gain)
    check_amount(f"total of group {name!r}", group["total"])
    digests = group.get("sha256", {})  # glowq 0.1 wrote none
    if not isinstance(digests, Mapping) or not _strings(list(digests.values())):
        raise ConfigError(f"sha256 of group {name!r} in config.json must hold one text for each factor.")


def check_base_model(base_model: Mapping[str, Any] | None) -> None:
    """Refuse a base that has no name, or whose name contains "..".

    Raises:
        ConfigError: fields are missing or unknown, or the name is not a text.
        UnsafePathError: the name contains "..", and so leads out of its folder.
    """
    if base_model is None or set(base_model) != {"name", "revision", "fingerprint"}:
        raise ConfigError("base_model in config.json must hold name, revision and fingerprint.")
    name = base_model["name"]
    if not isinstance(name, str) or not name:
        raise ConfigError("base_model.name in config.json must be a Hub name or a folder.")
    if ".." in name.replace("\\", "/").split("/"):
        raise UnsafePathError(f"base_model.name {name!r} in config.json leads out of its folder; refused.")


def _strings(values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and all(isinstance(v, str) for v in values)
