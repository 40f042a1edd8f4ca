"""`GainUnit`: what the gains of a correction are counted in."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["GainUnit"]


class GainUnit(StrEnum):
    """What one unit of gain is; its value is what config.json stores.

    Attributes:
        NATS: KL divergence from the reference's next-token distribution, nats a token; measured group by group.
        SQUARED_DISTANCE: squared distance from the reference's normalized states, of an encoder; measured likewise.
        SECOND_ORDER: the loss that an error costs to second order, by the gradients at the modules' outputs.
        SQUARED_OUTPUT: squared error of the modules' outputs, which compares less well across groups.
        UNMEASURED: nothing was measured; the correction was imported.
    """

    NATS = "nats"
    SQUARED_DISTANCE = "squared distance"
    SECOND_ORDER = "second order of the loss"
    SQUARED_OUTPUT = "squared output"
    UNMEASURED = "unmeasured"

    @property
    def description(self) -> str:
        """What a gain is a share of, for people."""
        return _DESCRIPTIONS[self]


_DESCRIPTIONS = {
    GainUnit.NATS: "KL divergence from full precision",
    GainUnit.SQUARED_DISTANCE: "squared distance of the states from full precision's",
    GainUnit.SECOND_ORDER: "loss, to second order",
    GainUnit.SQUARED_OUTPUT: "squared error of the modules' outputs",
    GainUnit.UNMEASURED: "what quantization cost",
}
