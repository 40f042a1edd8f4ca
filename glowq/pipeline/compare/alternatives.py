"""What a user can do instead of a correction: other settings of the same library, counted and scored in the same way.

There are three: half the group size for all modules ("finer"), the next larger bit width for all ("wider"), and the
larger width for the groups that gain most by measured divergence, within each budget ("mixed").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...errors import ConfigError
from ...evaluation.scores import Score, score_models
from ...models.reference import Reference
from ...quantizers.base import Unavailable
from ...quantizers.model import quantized_modules
from ...quantizers.registry import backend_of, method_of
from ...selection.budget import RankRequest
from ...solving.methods.base import get_method
from ..prepared import traced
from ..sequences import split_sequences
from ..wider_groups import WiderGroup, best_within, linear_bytes, measure_wider, mixed_config
from .cells import Cells, lists_of, tensors_of

__all__ = ["Alternative", "alternatives_of"]


@dataclass(frozen=True)
class Alternative:
    """One alternative, at one budget if it follows one.

    Attributes:
        method: "finer", "wider" or "mixed".
        budget: the budget as the user gave it; "" for an alternative that is the same for all budgets.
        budget_bytes: the budget in bytes, or None.
        added_bytes: bytes of the linear weights above those of the quantized model; 0 if there is a `reason`.
        settings: what the modules are quantized to, as text.
        widened: names of the groups with more bits; empty unless "mixed".
        reason: why there is no such alternative; None if there is one.
    """

    method: str
    budget: str = ""
    budget_bytes: int | None = None
    added_bytes: int = 0
    settings: str = ""
    widened: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def label(self) -> str:
        """Name of the alternative model."""
        return f"{self.method} at {self.budget}" if self.budget else self.method


Found = tuple[Alternative, Score | None]


def alternatives_of(
    model: nn.Module,
    reference: nn.Module,
    config: Any,
    load: Callable[[Any], nn.Module],
    *,
    calibration: Tensor,
    sequences: Tensor,
    budgets: Mapping[str, int],
    seed: int = 0,
    cells: Cells | None = None,
) -> list[Found]:
    """Make every alternative with the base's own library, count its bytes and score it.

    One alternative model is in memory at a time, beside `model` and `reference`. All are scored on the same sequences,
    so that their figures are paired with those of `score_models` for other models.

    Args:
        model: quantized model without a correction.
        reference: full-precision model that can be run.
        config: the transformers quantization config that `model` was quantized with, with its calibration text.
        load: function that takes such a config, and returns the reference's weights quantized with it.
        calibration: token ids that `glowq.correct` would get, shape (n, length), int64. Groups are measured on those of
            them that it would hold out.
        sequences: token ids to score on, shape (m, length), int64.
        budgets: budget as the user gave it -> bytes above the quantized model.
        seed: seed of the split.
        cells: store what is finished.

    Returns:
        Every alternative with its score, or without one if there is a reason for its absence.

    Raises:
        ConfigError: glowq has no backend for `config`.
        GlowQError: see `glowq.evaluation.scores.score_models` and `glowq.pipeline.wider_groups.measure_wider`.
    """
    backend = backend_of(config)
    if backend is None:
        raise ConfigError(f"glowq knows no other settings of {method_of(config)}.")
    cells = cells or Cells()
    makes = _Maker(model, reference, load, sequences, cells)
    found = [makes.whole("finer", backend.finer(config))]
    partner = backend.partner(config)
    if isinstance(partner, Unavailable):
        found.append(makes.whole("wider", backend.wider(config)))
        return [*found, *(_none("mixed", partner.reason, *budget) for budget in budgets.items())]
    _, held = split_sequences(calibration, get_method("glowq"), RankRequest(budget="1%"), "float", seed)
    assert held is not None  # groups are measured on it
    groups = {group.name: group for group in traced(model, calibration).groups}

    def measure() -> list[Any]:
        wide = None if partner is None else load(partner)
        with Reference(reference, type(model)) as source:
            several = measure_wider(model, wide, source, list(groups.values()), held)
        return [[entry.group.name, entry.bytes, entry.gain] for entry in several]

    found.append(makes.whole("wider", backend.wider(config)))
    measured = cells.value(
        "gains of more bits", measure, lambda found: [WiderGroup(groups[name], *more) for name, *more in found]
    )
    for budget, available in budgets.items():
        chosen = best_within(measured, available)
        if not chosen:
            smallest = min(entry.bytes for entry in measured)
            reason = f"no group gains by more bits, or the cheapest takes more than the budget ({smallest:,} bytes)"
            found.append(_none("mixed", reason, budget, available))
            continue
        settings = mixed_config(model, config, [entry.group for entry in chosen])
        names = tuple(entry.group.name for entry in chosen)
        found.append(makes.scored(Alternative("mixed", budget, available, widened=names), settings))
    return found


@dataclass(frozen=True)
class _Maker:
    """Makes and scores alternatives of one quantized model; see `alternatives_of` for the attributes."""

    model: nn.Module
    reference: nn.Module
    load: Callable[[Any], nn.Module]
    sequences: Tensor
    cells: Cells

    def whole(self, method: str, config: Any) -> Found:
        """One setting for all modules, or why there is none."""
        if isinstance(config, Unavailable):
            return _none(method, config.reason)
        return self.scored(Alternative(method), config)

    def scored(self, plain: Alternative, config: Any) -> Found:
        """The alternative with its bytes and settings, and its score."""

        def read(found: Any) -> Found:
            known = replace(plain, added_bytes=found["added_bytes"], settings=found["settings"])
            return known, tensors_of(Score, found["score"])

        return self.cells.value(plain.label, partial(self._made, plain, config), read)

    def _made(self, plain: Alternative, config: Any) -> dict[str, Any]:
        other = self.load(config)
        names = list(quantized_modules(self.model))
        score = score_models({"reference": self.reference, plain.label: other}, self.sequences)[plain.label]
        return {
            "added_bytes": linear_bytes(other, names) - linear_bytes(self.model, names),
            "settings": _settings(other, names, _kinds(self.model, names)),
            "score": lists_of(score),
        }


def _none(method: str, reason: str, budget: str = "", available: int | None = None) -> Found:
    return Alternative(method, budget, available, reason=reason), None


def _settings(model: nn.Module, names: Sequence[str], before: Mapping[str, str]) -> str:
    """What the modules are quantized to that have other settings than before."""
    new = Counter(kind for name, kind in _kinds(model, names).items() if kind != before[name])
    count = "" if new.total() == len(names) else f"{new.total()} of {len(names)} modules "
    return count + " and ".join(sorted(new))


def _kinds(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Module name -> its settings as text; the dtype of one that is not quantized."""
    backends = quantized_modules(model)
    dense = str(getattr(model, "dtype", "")).removeprefix("torch.")
    return {
        name: str(backends[name].scheme(model.get_submodule(name))) if name in backends else dense for name in names
    }
