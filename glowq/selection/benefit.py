"""Where in a model a correction is predicted to help: its gains by layer and by kind of group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..factors.factors import GroupFactors
from ..factors.group import Group
from ..factors.units import GainUnit

__all__ = ["Benefit", "benefit_map"]


@dataclass(frozen=True)
class Benefit:
    """What each group of a correction is predicted to give back.

    Attributes:
        layers: blocks, in the order of the forward.
        kinds: a group's name within its block.
        values: gains of every layer and kind, summed over ranks; 0 where the group is not restored, None where
            there is no such group.
        unit: "nats", "squared distance" of an encoder's states, or "squared output".
        budget: that the correction was cut to.
    """

    layers: list[str]
    kinds: list[str]
    values: list[list[float | None]]
    unit: str
    budget: str


def benefit_map(factors: Sequence[GroupFactors], groups: Sequence[Group], unit: GainUnit, budget: str) -> Benefit:
    """Predicted benefit of every group of a correction, by layer and by kind of group.

    Args:
        factors: the correction's; their gains are summed over the ranks that they hold.
        groups: every group of the model, restored or not, in the order of the forward.
        unit: of the gains.
        budget: that the correction was cut to.
    """
    gains = {entry.group.name: float(entry.gains.sum()) for entry in factors}
    places = {group.name: (group.block, group.name.removeprefix(f"{group.block}.")) for group in groups}
    found = {place: gains.get(name, 0.0) for name, place in places.items()}
    layers = list(dict.fromkeys(layer for layer, _ in found))
    kinds = list(dict.fromkeys(kind for _, kind in found))
    values = [[found.get((layer, kind)) for kind in kinds] for layer in layers]
    return Benefit(layers, kinds, values, unit.value, budget)
