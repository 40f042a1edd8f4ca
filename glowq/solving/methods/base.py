"""The solver methods by name: one shared solve, with another statistic or another grouping.

To add a method, write one file in this folder that calls `register`; it is found by its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from torch import Tensor

from ...errors import CalibrationError, ConfigError
from ..low_rank import Factors
from ..moments import Moments

__all__ = ["Allocation", "Method", "Statistic", "check_measured", "get_method", "method_names", "register"]

Statistic = Literal["none", "magnitude", "second"]
Allocation = Literal["uniform", "gain", "groups"]


@dataclass(frozen=True)
class Method:
    """One way to turn a weight error and its input moments into a low-rank correction.

    Attributes:
        name: what users write.
        shared: True for one right factor a group, False for one a module.
        statistic: what calibration must measure: nothing, the magnitude per input, or the full second moment.
        solve: (error (O, d), moments, rank, seed) to Factors of that rank.
        summary: one line for listings.
        source: the paper.
        two_sided: whether `solve` reads the output moment too, so that gains are in nats and compare across groups.
        allocation: what its paper spends a budget on: one rank for all groups; the ranks that gain most for their
            bytes; or whole groups at one rank, in the order of `score`. `glowq.pipeline.comparison` follows it.
        score: where whole groups are chosen: (a group's gains at the rank (r,), its ||E||_F / ||W||_F) to its score.
    """

    name: str
    shared: bool
    statistic: Statistic
    solve: Callable[[Tensor, Moments, int, int], Factors]
    summary: str
    source: str
    two_sided: bool = False
    allocation: Allocation = "uniform"
    score: Callable[[Tensor, float], float] | None = None


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Make a method known by its name.

    Raises:
        ConfigError: another method already has the name.
    """
    if method.name in _METHODS:
        raise ConfigError(f"method {method.name!r} is registered twice; give one of the two another name.")
    _METHODS[method.name] = method
    return method


def get_method(name: str) -> Method:
    """The method registered under a name.

    Raises:
        ConfigError: no method has that name; the message lists those there are.
    """
    if name not in _METHODS:
        near = get_close_matches(name, method_names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"method must be one of {', '.join(method_names())}; found {name!r}.{hint}")
    return _METHODS[name]


def method_names() -> list[str]:
    """The names of every registered method, sorted."""
    return sorted(_METHODS)


def check_measured(moments: Moments, statistic: Statistic) -> None:
    """Refuse moments that lack what a method minimises, rather than minimise something else.

    Raises:
        CalibrationError: no token was counted, or what the method needs was not streamed.
    """
    found = (moments.magnitude,) if statistic == "magnitude" else (moments.second, moments.energy)
    missing = all(value is None for value in found)
    wanted = "magnitude" if statistic == "magnitude" else "second moment"
    if moments.tokens == 0 or missing:
        raise CalibrationError(
            f"the {statistic} statistic of the inputs is needed; found {moments.tokens} tokens counted"
            f"{f' and no {wanted}' if missing else ''}. Calibrate with statistic={statistic!r}."
        )
