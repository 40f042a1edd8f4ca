"""The repeated blocks of a model, and the block that contains a module."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

__all__ = ["block_index", "blocks"]


def blocks(model: nn.Module) -> list[str]:
    """Names of the repeated blocks of `model` (decoder or encoder layers), in module order.

    A transformers model lists the classes that must not be split over devices (`_no_split_modules`): their instances
    are its blocks. If there are none, the elements of module lists are the blocks; of lists of lists, the elements of
    the inner ones, since a list has no forward of its own. Blocks inside of another block are left out.
    """
    kinds: set[str] = set()
    for module in model.modules():
        kinds.update(getattr(module, "_no_split_modules", None) or ())
    named = [name for name, module in model.named_modules() if type(module).__name__ in kinds]
    if not named:
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        elements = [f"{name}.{index}" for name in lists for index in range(len(model.get_submodule(name)))]  # type: ignore[arg-type]
        named = [name for name in elements if not isinstance(model.get_submodule(name), nn.ModuleList | nn.ModuleDict)]
    candidates = set(named)
    return [name for name in named if not any(parent in candidates for parent in _ancestors(name))]


def block_index(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Module name -> name of the repeated block that contains the module, or its own name if no block does."""
    found = set(blocks(model))
    return {name: next((a for a in _ancestors(name, include_self=True) if a in found), name) for name in names}


def _ancestors(name: str, *, include_self: bool = False) -> Iterable[str]:
    parts = name.split(".")
    for length in range(len(parts) if include_self else len(parts) - 1, 0, -1):
        yield ".".join(parts[:length])
