"""`GainUnit`: the unit of a correction's gains."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["GainUnit"]


class GainUnit(StrEnum):
    """The unit of gains; config.json stores its value.

    Attributes:
        NATS: KL divergence from the reference's next-token distribution, in nats per token; measured for each group.
        SQUARED_DISTANCE: squared distance from the normalized states of a reference encoder; measured for each group.
        SECOND_ORDER: increase of the loss to second order, computed from the gradients at the modules' outputs.
        SQUARED_OUTPUT: squared error of the modules' outputs, which is less comparable between groups.
        UNMEASURED: nothing was measured; the correction was imported.
    """

    NATS = "nats"
    SQUARED_DISTANCE = "squared distance"
    SECOND_ORDER = "second order of the loss"
    SQUARED_OUTPUT = "squared output"
    UNMEASURED = "unmeasured"

    @property
    def description(self) -> str:
        """Text for people: the quantity that gains are shares of."""
        return _DESCRIPTIONS[self]


_DESCRIPTIONS = {
    GainUnit.NATS: "KL divergence from full precision",
    GainUnit.SQUARED_DISTANCE: "squared distance of the states from full precision's",
    GainUnit.SECOND_ORDER: "loss, to second order",
    GainUnit.SQUARED_OUTPUT: "squared error of the modules' outputs",
    GainUnit.UNMEASURED: "what quantization cost",
}
