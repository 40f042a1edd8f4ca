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
    """The predicted benefit of each group of a correction.

    Attributes:
        layers: names of the blocks, in the order of the forward.
        kinds: names of the groups within their block.
        values: gains of every layer and kind, summed over ranks; 0 if the group has no correction, None if there is no
            such group.
        unit: "nats", "squared distance" of an encoder's states, or "squared output".
        budget: budget that the correction was cut to.
    """

    layers: list[str]
    kinds: list[str]
    values: list[list[float | None]]
    unit: str
    budget: str


def benefit_map(factors: Sequence[GroupFactors], groups: Sequence[Group], unit: GainUnit, budget: str) -> Benefit:
    """Compute the predicted benefit of every group of a correction, by layer and by kind of group.

    Args:
        factors: factors of the correction; their gains are summed over their ranks.
        groups: every group of the model, with or without a correction, in the order of the forward.
        unit: unit of the gains.
        budget: budget that the correction was cut to.
    """
    gains = {entry.group.name: float(entry.gains.sum()) for entry in factors}
    places = {group.name: (group.block, group.name.removeprefix(f"{group.block}.")) for group in groups}
    found = {place: gains.get(name, 0.0) for name, place in places.items()}
    layers = list(dict.fromkeys(layer for layer, _ in found))
    kinds = list(dict.fromkeys(kind for _, kind in found))
    values = [[found.get((layer, kind)) for kind in kinds] for layer in layers]
    return Benefit(layers, kinds, values, unit.value, budget)
