"""Switch corrections off and on again: a model's, or those of some of its groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from torch import nn

from ..errors import ConfigError
from .attach import attached
from .container import SharedCorrection

__all__ = ["disabled", "set_enabled"]


@contextmanager
def disabled(model: nn.Module, groups: Iterable[str] | None = None) -> Iterator[nn.Module]:
    """Inside this context `model` runs without its correction, or without that of some groups.

    Args:
        model: carries a correction.
        groups: names of groups, the keys of `correction.ranks`; None for all. The others stay as they are.

    Raises:
        ConfigError: the model carries no correction of such a group.
    """
    containers = _chosen(model, groups)
    before = [container.enabled for container in containers]
    for container in containers:
        container.enabled = False
    try:
        yield model
    finally:
        for container, enabled in zip(containers, before, strict=True):
            container.enabled = enabled


def set_enabled(model: nn.Module, enabled: bool, groups: Iterable[str] | None = None) -> None:
    """Switch the correction of `model`, or that of some groups, on or off for good.

    A group that is off computes nothing and keeps its factors: `save_pretrained` stores them, and a saved model is
    loaded with every group on. `dequantize` merges what runs. A compiled model is compiled once more for each set of
    groups that it has not run with.

    Args:
        model: carries a correction.
        enabled: whether the correction runs.
        groups: names of groups, the keys of `correction.ranks`; None for all. The others stay as they are.

    Raises:
        ConfigError: the model carries no correction of such a group; none is switched then.
    """
    for container in _chosen(model, groups):
        container.enabled = enabled


def _chosen(model: nn.Module, groups: Iterable[str] | None) -> list[SharedCorrection]:
    found = attached(model)
    if isinstance(groups, str):
        groups = [groups]
    names = list(found) if groups is None else list(groups)
    for name in names:
        if name not in found:
            near = get_close_matches(name, found, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"the model carries no correction of a group {name!r} (it carries {len(found)}); the keys of "
                f"correction.ranks are the names of all.{hint}"
            )
    return [found[name] for name in names]
