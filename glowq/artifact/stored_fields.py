"""Checks of the fields that config.json stores about a correction: its groups, and the name of its base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, UnsafePathError
from ..factors.group import group_name
from ..utils.checks import check_amount, check_int, check_text, shown

__all__ = ["BASE_PLACE", "GROUP_FIELDS", "check_base_model", "check_group"]

GROUP_FIELDS = frozenset({"members", "in_features", "out_features", "block", "rank", "gains", "total", "sha256"})
BASE_PLACE = ("name", "revision", "subfolder", "variant")
"""The fields of a base model that say where its files are."""

_LIST = (list, tuple)
_REQUIRED = {"name", "revision", "fingerprint"}  # of `base_model`
_OPTIONAL = ("backbone", "subfolder", "variant")
_NAME = re.compile(r"\w[\w./-]*")  # of a branch, a tag, a pull request (refs/pr/1), a commit, a folder or a variant


def check_group(name: str, group: Mapping[str, Any]) -> None:
    """Refuse a group whose fields are missing, unknown or do not fit together.

    Raises:
        ConfigError: the message names the group and the field.
    """
    if set(group) - {"sha256"} != GROUP_FIELDS - {"sha256"}:
        odd = sorted((set(group) ^ GROUP_FIELDS) - {"sha256"})[0]
        raise ConfigError(f"group {name!r} in config.json: field {shown(odd)} is missing or unknown.")
    members, widths, gains = group["members"], group["out_features"], group["gains"]
    if not isinstance(members, _LIST) or not all(isinstance(member, str) and member for member in members):
        raise ConfigError(f"members of group {name!r} in config.json must be a list of names, found {shown(members)}.")
    if members and name != group_name(members):
        raise ConfigError(
            f"group {name!r} in config.json has the members of the group {group_name(members)!r}: they would get the "
            "factors of other modules. Download or correct again."
        )
    if not isinstance(widths, _LIST) or len(widths) != len(members) or not members:
        raise ConfigError(f"group {name!r} in config.json needs as many out_features as members.")
    for width in (group["in_features"], *widths):
        check_int(f"a width of group {name!r}", width, 1)
    check_text(f"block of group {name!r}", group["block"])
    check_int(f"rank of group {name!r}", group["rank"], 1)
    if not isinstance(gains, _LIST) or len(gains) != group["rank"]:
        raise ConfigError(f"group {name!r} in config.json needs one gain per rank.")
    for gain in gains:
        check_amount(f"a gain of group {name!r}", gain)
    check_amount(f"total of group {name!r}", group["total"])
    digests = group.get("sha256", {})  # glowq 0.1 wrote none
    if not isinstance(digests, Mapping) or not all(isinstance(digest, str) for digest in digests.values()):
        raise ConfigError(f"sha256 of group {name!r} in config.json must hold one text for each factor.")


def check_base_model(base_model: Mapping[str, Any] | None) -> None:
    """Refuse a base that has no name or no fingerprint, or that leads out of its folder.

    Raises:
        ConfigError: fields are missing or unknown, or of another type.
        UnsafePathError: the name, revision, subfolder or variant contains "..", and so leads out of its folder.
    """
    if base_model is None or not _REQUIRED <= set(base_model) <= _REQUIRED | set(_OPTIONAL):
        raise ConfigError("base_model in config.json must hold name, revision and fingerprint.")
    name = base_model["name"]
    if not isinstance(name, str) or not name or "\0" in name:
        raise ConfigError(f"base_model.name in config.json must be a Hub name or a folder, found {shown(name)}.")
    check_text("base_model.fingerprint", base_model["fingerprint"])
    for field in ("revision", *_OPTIONAL):
        check_text(f"base_model.{field}", base_model.get(field), optional=True)
    # huggingface_hub looks up a revision as a file in its cache.
    paths = {field: base_model.get(field) or "" for field in BASE_PLACE}
    for field, value in paths.items():
        if ".." in value.replace("\\", "/").split("/"):
            raise UnsafePathError(f"base_model.{field} {shown(value)} in config.json leads out of its folder; refused.")
    for field, value in paths.items():
        if field != "name" and value and _NAME.fullmatch(value) is None:
            kind = "branch, tag or commit" if field == "revision" else f"name of a {field}"
            raise ConfigError(f"base_model.{field} in config.json is no {kind}: {shown(value)}.")
