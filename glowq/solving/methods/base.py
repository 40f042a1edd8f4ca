"""The registry of the solver methods.

To add a method, write a file in this folder that calls `register`, and import it in the folder's `__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ...errors import CalibrationError, ConfigError
from ...utils.names import unknown_method
from ..low_rank import Factors
from ..moments import Moments

__all__ = ["Allocation", "Method", "Statistic", "check_measured", "get_method", "method_names", "register"]

Statistic = Literal["none", "magnitude", "second"]
Allocation = Literal["uniform", "gain", "groups", "effective-rank"]


@dataclass(frozen=True)
class Method:
    """One way to turn a weight error and its input moments into a low-rank correction.

    Attributes:
        name: name that users give.
        shared: True for one right factor per group, False for one per module.
        statistic: what calibration must measure: nothing, the magnitude per input, or the full second moment.
        solve: function (error (O, d), moments, rank, seed) -> Factors of that rank.
        summary: one line for listings.
        source: the paper.
        two_sided: whether `solve` also reads the output moment; gains are then in nats and comparable between groups.
        allocation: how the paper uses a budget: "uniform", one rank for all groups; "gain", the ranks with the largest
            gain per byte; "groups", whole groups at one rank, in the order of `score`; "effective-rank", ranks in
            proportion to the root of each group's effective rank over its bytes. `glowq compare` does the last two.
        score: for "groups": function (a group's gains at the rank (r,), its ||E||_F / ||W||_F) -> score of the group.
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
    """Register a method under its name.

    Raises:
        ConfigError: another method already has the name.
    """
    if method.name in _METHODS:
        raise ConfigError(f"method {method.name!r} is registered twice; give one of the two another name.")
    _METHODS[method.name] = method
    return method


def get_method(name: str) -> Method:
    """Return the method that is registered under a name.

    Raises:
        ConfigError: no method has that name; the message lists the names.
    """
    if name not in _METHODS:
        raise ConfigError(unknown_method(name, method_names()))
    return _METHODS[name]


def method_names() -> list[str]:
    """The names of every registered method, sorted."""
    return sorted(_METHODS)


def check_measured(moments: Moments, statistic: Statistic) -> None:
    """Raise an error if the moments lack what a method needs, so that it does not minimise something else.

    Raises:
        CalibrationError: no token was counted, or the statistic was not measured.
    """
    found = (moments.magnitude,) if statistic == "magnitude" else (moments.second, moments.energy)
    missing = all(value is None for value in found)
    wanted = "magnitude" if statistic == "magnitude" else "second moment"
    if moments.tokens == 0 or missing:
        raise CalibrationError(
            f"the {statistic} statistic of the inputs is needed; found {moments.tokens} tokens counted"
            f"{f' and no {wanted}' if missing else ''}. Calibrate with statistic={statistic!r}."
        )
