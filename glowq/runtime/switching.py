"""Switch the correction of a model, or of some of its groups, off and on again."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import ConfigError
from ..utils.names import did_you_mean
from .attach import attached
from .container import SharedCorrection

__all__ = ["disabled", "set_enabled"]

_LOCK = threading.Lock()  # a forward reads one attribute, `enabled`; this protects the counters behind it


@contextmanager
def disabled(model: nn.Module, groups: Iterable[str] | None = None) -> Iterator[nn.Module]:
    """Inside this context `model` runs without its correction, or without the correction of some groups.

    This holds for every thread that runs the model. Contexts may overlap, in one thread or in several: a group is off
    as long as one context that names it is open, and afterwards it is again what `set_enabled` made it.

    Args:
        model: a model with a correction.
        groups: names of the groups, which are the keys of `correction.ranks`; None for all. Other groups do not change.

    Raises:
        ConfigError: the model carries no correction of one of these groups.
    """
    containers = _chosen(model, groups)
    _update(containers, pauses=1)
    try:
        yield model
    finally:
        _update(containers, pauses=-1)


def set_enabled(model: nn.Module, enabled: bool, groups: Iterable[str] | None = None) -> None:
    """Switch the correction of `model`, or of some groups, on or off until it is switched again.

    A group that is off computes nothing and keeps its factors: `save_pretrained` stores them, and a saved model is
    loaded with every group on. `dequantize` merges only the groups that are on. A compiled model is compiled once more
    for each new set of groups that are on. Inside of `disabled`, a group stays off until that context ends.

    Args:
        model: a model with a correction.
        enabled: whether the correction runs.
        groups: names of the groups, which are the keys of `correction.ranks`; None for all. Other groups do not change.

    Raises:
        ConfigError: the model carries no correction of one of these groups; then no group is switched.
    """
    _update(_chosen(model, groups), enabled)


def _update(containers: Iterable[SharedCorrection], switched: bool | None = None, pauses: int = 0) -> None:
    with _LOCK:
        for container in containers:
            on = container.switched_on if switched is None else switched
            container.switch(on, container.pauses + pauses)


def _chosen(model: nn.Module, groups: Iterable[str] | None) -> list[SharedCorrection]:
    found = attached(model)
    if isinstance(groups, str):
        groups = [groups]
    names = list(found) if groups is None else list(groups)
    for name in names:
        if name not in found:
            raise ConfigError(
                f"the model carries no correction of a group {name!r} (it carries those of {len(found)} groups); the "
                f"keys of correction.ranks are the names of all groups. {did_you_mean(name, found)}".rstrip()
            )
    return [found[name] for name in names]
