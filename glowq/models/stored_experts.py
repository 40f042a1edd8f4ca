"""What the headers of a checkpoint say about experts whose matrices are stacked in one parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from ..quantizers.base import StoredModule

__all__ = ["divide", "expert_names", "joined"]


def expert_names(name: str, count: int) -> list[str]:
    """Names of the modules that `open_experts` makes of a parameter with the matrices of `count` experts."""
    holder, _, stack = name.rpartition(".")
    return [f"{holder}.{index}.{stack}" for index in range(count)]


def joined(modules: Iterable[StoredModule], rename: Callable[[str], str]) -> dict[str, StoredModule]:
    """Modules by their names in the model.

    torchao describes a tensor of Mixtral under its name in the model, and transformers stores it under another.
    """
    found: dict[str, StoredModule] = {}
    for module in modules:
        name = rename(module.name)
        other = found.get(name, module)
        found[name] = replace(
            module,
            dtypes={**other.dtypes, **module.dtypes},
            shapes={**other.shapes, **module.shapes},
            metadata={**other.metadata, **module.metadata},
            sizes={**other.sizes, **module.sizes},
        )
    return found


def divide(stored: dict[str, StoredModule], name: str, count: int) -> None:
    """Give each expert a module of its own, if the files hold a library's tensors for all of them.

    Args:
        stored: module name -> module; changed in place.
        name: the parameter that holds the matrices of all experts of a layer.
        count: number of experts.
    """
    holder, _, stack = name.rpartition(".")
    whole = stored.get(holder)
    if whole is None:
        return
    parts = {key: f"_weight_{key.removeprefix(f'_{stack}_')}" for key in whole.shapes if key.startswith(f"_{stack}_")}
    if not parts or any(whole.shapes[key][:1] != (count,) for key in parts):
        return
    for expert in expert_names(name, count):
        stored[expert] = StoredModule(
            expert,
            {part: whole.dtypes[key] for key, part in parts.items()},
            {part: whole.shapes[key][1:] for key, part in parts.items()},
            {"weight": whole.metadata[stack]} if stack in whole.metadata else {},
            {part: whole.sizes[key] // count for key, part in parts.items()},
        )
    rest = [key for key in whole.shapes if key not in parts]
    stored[holder] = replace(
        whole,
        dtypes={key: whole.dtypes[key] for key in rest},
        shapes={key: whole.shapes[key] for key in rest},
        metadata={key: text for key, text in whole.metadata.items() if key != stack},
        sizes={key: whole.sizes[key] for key in rest},
    )
