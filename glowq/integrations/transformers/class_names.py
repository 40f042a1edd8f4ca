"""One model in several classes: `AutoModel` has other module names than `AutoModelForCausalLM`, and no head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from ...artifact.config import GlowQConfig
from ...artifact.factor_layout import FACTOR_KEYS
from ...artifact.fingerprint import fingerprint
from ...factors.factors import GroupFactors
from ...factors.group import Group, group_name
from ...models.candidates import linears, renaming

__all__ = ["absent_linears", "in_class", "is_other_class", "with_fingerprint"]


def is_other_class(model: Any) -> bool:
    """Whether a model that is being loaded has another class than config.json says that was saved."""
    stored = getattr(model.config, "architectures", None) or [type(model).__name__]
    return type(model).__name__ not in stored


def absent_linears(model: Any, shards: Sequence[str]) -> list[str]:
    """The linear layers of a model that its checkpoint lacks, such as a new head; a quantizer must leave them alone.

    Args:
        model: a transformers model before its weights are loaded and before its layers are replaced.
        shards: the safetensors files that it will be loaded from.
    """
    rename, present = renaming(model), set()
    for shard in shards:
        with safe_open(Path(shard), framework="pt") as file:
            names = file.keys()
        parts = [name.split(".") for name in names if not re.search(FACTOR_KEYS, name)]
        present |= {".".join(part[:end]) for part in parts for end in range(1, len(part))}
    stored = {rename(name) for name in present}
    return [name for name, tied in linears(model).items() if name not in stored and not tied]


def in_class(
    model: Any, config: GlowQConfig, factors: Sequence[GroupFactors]
) -> tuple[GlowQConfig, list[GroupFactors]]:
    """A correction with the names that its modules have in the class of `model`.

    As transformers does with weights, the prefix of the base model is removed from names or added to them. Groups of a
    head that `model` does not have are left out.

    Args:
        model: the loaded model.
        config: description of the correction.
        factors: its factors.

    Returns:
        The same two objects if all names are the same. Modules that `model` should have and has not keep their names.
    """
    prefix = getattr(model, "base_model_prefix", "")
    members = [member for entry in factors for member in entry.group.members]
    within = any(member.startswith(f"{prefix}.") for member in members)

    def name_in(stored: str) -> str | None:
        if not prefix or _has(model, stored):
            return stored
        inside = stored.startswith(f"{prefix}.")
        moved = stored.removeprefix(f"{prefix}.") if inside else f"{prefix}.{stored}"
        if _has(model, moved):
            return moved
        return None if within and not inside else stored

    named = {member: name_in(member) for member in members}
    if all(name == member for member, name in named.items()):
        return config, list(factors)
    groups, kept, stored_groups = {}, [], config.groups or {}
    for entry in factors:
        found = [named[member] for member in entry.group.members]
        names = [name for name in found if name is not None]
        if len(names) < len(found):
            continue
        block = name_in(entry.group.block) or entry.group.block
        group = replace(entry.group, name=group_name(names), members=tuple(names), block=block)
        lefts = {named[member] or member: left for member, left in entry.lefts.items()}
        kept.append(replace(entry, group=group, lefts=lefts))
        groups[group.name] = _stored(stored_groups[entry.group.name], entry.group, group)
    return config.with_groups(groups), kept


def with_fingerprint(model: nn.Module, config: GlowQConfig) -> GlowQConfig:
    """The description with the fingerprint of `model`, under whose names it is now."""
    base_model = {**(config.base_model or {}), "fingerprint": fingerprint(model)}
    found = GlowQConfig(**{**config.to_dict(), "base_model": base_model})
    found.record(change=None)  # measured on the answers of another class
    return found


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _stored(fields: dict[str, Any], before: Group, after: Group) -> dict[str, Any]:
    """The stored description of a group under its new names."""
    names = {before.name: after.name, **dict(zip(before.members, after.members, strict=True))}
    digests = {
        f"{names[module]}.{kind}": digest
        for (module, _, kind), digest in (
            (key.rpartition("."), value) for key, value in fields.get("sha256", {}).items()
        )
    }
    found = {**fields, "members": list(after.members), "block": after.block}
    return {**found, "sha256": digests} if digests else found
