"""`Provenance`: a record of how a correction was made, with typed fields, as config.json stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from ..errors import ConfigError
from ..evaluation.figures import is_better, measured_share
from ..factors.units import GainUnit
from ..utils.checks import check_amount, check_int, check_text, is_number, shown

__all__ = [
    "Benefit",
    "Coverage",
    "HeldOut",
    "Improvement",
    "Instead",
    "Mixed",
    "Provenance",
    "RoundingCost",
    "Selected",
]


class HeldOut(TypedDict, total=False):
    """Perplexities on held-out text, and the share of the gap between them that the correction recovered."""

    reference: float | None
    quantized: float | None
    corrected: float | None
    recovered: float | None
    recovered_ci95: list[float | None] | None
    tokens: int


class RoundingCost(TypedDict, total=False):
    """Mean divergence from the reference, with rounded and unrounded factors; see `glowq.evaluation.rounding_cost`."""

    tokens: int
    quantized: float
    rounded: float
    same_ranks: float
    same_bytes: float


class Selected(TypedDict, total=False):
    """The bytes and held-out figures of the larger correction that this one was cut from, and the budget of the cut."""

    of_factor_bytes: int
    of_held_out: HeldOut | None
    budget: str | int | None


class Benefit(TypedDict, total=False):
    """Measured benefit of a group with its 95% interval, in the unit of the gains."""

    value: float
    low: float
    high: float


class Improvement(TypedDict, total=False):
    """Mean divergence from the reference without and with the correction; see `glowq.evaluation.improvement`."""

    tokens: int
    quantized: float
    corrected: float
    benefit: Benefit


class Mixed(TypedDict, total=False):
    """The groups of the base that have more bits, the bytes of these bits, and the bytes of a base without them."""

    widened: list[str]
    added_bytes: int
    of_base_bytes: int


class Instead(TypedDict, total=False):
    """What more bits for some groups are predicted to undo in the bytes of the factors, and how many bits."""

    predicted: float
    bits: float


class Coverage(TypedDict, total=False):
    """Bytes of the model's weights: by module, by reason, and by class; see `glowq.artifact.coverage`."""

    modules: Mapping[str, int]
    skipped: Mapping[str, int]
    not_quantized: Mapping[str, int]


_COUNTS = frozenset({"tokens", "of_factor_bytes", "added_bytes", "of_base_bytes"})
_KINDS = (HeldOut, RoundingCost, Selected, Benefit, Improvement, Mixed, Instead)
_FIGURES = frozenset(key for kind in _KINDS for key in kind.__annotations__)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a correction was made. A field is None if it is unknown or does not apply.

    Attributes:
        glowq: version of glowq that made the correction.
        calibration_tokens: number of tokens that it was calibrated on.
        sequence_length: tokens per calibration sequence.
        gains: unit of all gains and of `total`.
        measured_tokens: number of tokens that each group's benefit was measured on.
        not_restored: group name -> measured benefit, for groups that a budget left out because they made answers worse.
        total: loss of the quantized model in the unit of the gains: its divergence from the reference where groups were
            measured, or else the sum of what the solver predicts for all groups.
        distilled_steps: steps of gradient descent on the chosen factors.
        factor_dtype: "int8", "int4" or "int3" if the factors were rounded to it.
        rounding: measured loss of accuracy by rounding.
        improvement: measured divergence without and with the correction, on text that it was not calibrated on; None if
            no text was held out, or if the model's outputs cannot be compared.
        change: mean divergence between the answers with and without the correction, to fixed random tokens; see
            `glowq.evaluation.change`.
        held_out: figures on held-out text.
        selected: the larger correction that this one was cut from.
        instead: share of `total` that more bits for the groups that gain most are predicted to undo in the same bytes;
            see `glowq.pipeline.more_bits`.
        mixed: the groups of the base that were quantized with more bits, within the same budget as the factors.
        coverage: bytes of the weights that can be corrected, that cannot, and that are not quantized.
        command: the exact command lines, one per line.
        adapter_base: base model of the adapter that the correction was imported from.

    Raises:
        ConfigError: a value has the wrong type or is not allowed; the message names the field.
    """

    glowq: str | None = None
    calibration_tokens: int | None = None
    sequence_length: int | None = None
    gains: GainUnit | None = None
    measured_tokens: int | None = None
    not_restored: Mapping[str, Benefit] | None = None
    total: float | None = None
    distilled_steps: int | None = None
    factor_dtype: str | None = None
    rounding: RoundingCost | None = None
    improvement: Improvement | None = None
    change: float | None = None
    held_out: HeldOut | None = None
    selected: Selected | None = None
    instead: Instead | None = None
    mixed: Mixed | None = None
    coverage: Coverage | None = None
    command: str | None = None
    adapter_base: str | None = None

    def __post_init__(self) -> None:
        for name in ("calibration_tokens", "sequence_length", "measured_tokens", "distilled_steps"):
            check_int(f"provenance.{name}", getattr(self, name), 0, optional=True)
        for name in ("glowq", "factor_dtype", "command", "adapter_base"):
            check_text(f"provenance.{name}", getattr(self, name), optional=True)
        for name in ("rounding", "improvement", "held_out", "selected", "instead", "mixed"):
            if getattr(self, name) is not None:
                _check_figures(f"provenance.{name}", getattr(self, name))
        for part, sizes in _items("provenance.coverage", self.coverage or {}):
            for name, size in _items(f"provenance.coverage.{part}", sizes):
                check_int(f"provenance.coverage.{part} of {name!r}", size, 0)
        if self.not_restored is not None:
            for group, benefit in _items("provenance.not_restored", self.not_restored):
                _check_figures(f"provenance.not_restored of group {group!r}", benefit)
        if self.total is not None:
            check_amount("provenance.total", self.total)
        if self.change is not None:
            check_amount("provenance.change", self.change)
        if self.gains is not None:
            if self.gains not in list(GainUnit):
                units = ", ".join(repr(unit.value) for unit in GainUnit)
                raise ConfigError(f"provenance.gains in config.json must be one of {units}, found {self.gains!r}.")
            object.__setattr__(self, "gains", GainUnit(self.gains))  # a file holds it as text

    @classmethod
    def names(cls) -> list[str]:
        """The names of all fields."""
        return [field.name for field in fields(cls)]

    def times_predicted(self, predicted: float | None) -> float | None:
        """How many times what was predicted of the whole correction was measured of it; None if that is not known.

        The gains of single ranks come from a second-order model of the loss. All together undo more where the errors of
        different groups add up, as those of 3-bit weights do. The factor is nearly the same at every budget (see the
        guide on results), so that it also tells what to expect of a part of the correction.

        Args:
            predicted: share of `total` that the gains of all ranks are.
        """
        found, share = self.improvement, measured_share(self.improvement)
        if found is None or share is None or not predicted or self.gains in (None, GainUnit.SQUARED_OUTPUT):
            return None
        if self.distilled_steps or found["benefit"]["low"] is None or not is_better(found):
            return None
        return share / predicted

    def to_dict(self) -> dict[str, Any]:
        """The fields that config.json stores: all that are not None."""
        known = {name: getattr(self, name) for name in self.names() if getattr(self, name) is not None}
        return {name: value.value if isinstance(value, GainUnit) else value for name, value in known.items()}


def _items(name: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} in config.json must be a JSON object, found {type(value).__name__}.")
    return list(value.items())


def _check_figures(name: str, figures: Any) -> None:
    """Refuse figures of one of `_KINDS` that are not of their types.

    A field that this version does not know is accepted if it is a plain value, because another minor version of the
    format may write it.

    Raises:
        ConfigError: the message names the field.
    """
    for key, value in _items(name, figures):
        field = f"{name}.{key}"
        if key in _COUNTS:
            check_int(field, value, 0, optional=name.endswith("selected"))
        elif key in ("of_held_out", "benefit"):
            if value is not None:
                _check_figures(field, value)
        elif key == "recovered_ci95":
            pair = [None, None] if value is None else value
            if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(map(_is_figure, pair)):
                raise ConfigError(f"{field} in config.json must be two numbers, found {shown(value)}.")
        elif key == "widened":
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                raise ConfigError(f"{field} in config.json must be a list of names, found {shown(value)}.")
        elif key == "budget":
            if not (value is None or is_number(value)):
                check_text(field, value)
        elif key in _FIGURES and not _is_figure(value):
            raise ConfigError(f"{field} in config.json must be a number, found {shown(value)}.")
        elif not (_is_figure(value) or isinstance(value, str | bool)):
            raise ConfigError(f"{field} in config.json must be a number or a text, found {shown(value)}.")


def _is_figure(value: Any) -> bool:
    return value is None or is_number(value)
