"""Spend a budget on ranks and on bits: plan which groups of a base get the next larger width before it is corrected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..artifact.provenance import Mixed
from ..artifact.request import CorrectionRequest
from ..errors import ConfigError, NoGainError
from ..factors.form import FactorForm, bits_of
from ..factors.group import Group
from ..models.reference import Reference
from ..quantizers.base import Unavailable
from ..quantizers.model import packed_bytes
from ..quantizers.registry import backend_of, method_of
from ..runtime.attach import detach, factor_dtype
from ..selection.allocation import GroupGains, Step
from ..selection.budget import parse_budget
from ..selection.mixing import divide
from ..solving.methods.base import get_method
from .correct import correct
from .prepared import examples, traced
from .sequences import calibration_sequences, split_sequences
from .wider_groups import measure_wider, mixed_config

__all__ = ["Mixture", "check_mixable", "plan_mixture"]


@dataclass(frozen=True)
class Mixture:
    """A plan for a base with two widths, and for the ranks of its correction.

    Attributes:
        config: transformers quantization config of the base.
        groups: the groups with more bits, at least one.
        added_bytes: bytes of these bits.
        of_base_bytes: bytes of the quantized weights of the base without them.
        budget: bytes that are left for the factors.
        ranks_gain: whether any rank gains more for its bytes than bits do. If not, factors only get the bytes that are
            left over.
    """

    config: Any
    groups: tuple[Group, ...]
    added_bytes: int
    of_base_bytes: int
    budget: int
    ranks_gain: bool

    @property
    def record(self) -> Mixed:
        """What the provenance of the correction records."""
        names = [group.name for group in self.groups]
        return Mixed(widened=names, added_bytes=self.added_bytes, of_base_bytes=self.of_base_bytes)


def check_mixable(config: Any) -> None:
    """Refuse a base that cannot have two widths in one model, before anything is loaded.

    Args:
        config: transformers quantization config of the base; None for a model that is quantized already, or that holds
            float weights.

    Raises:
        ConfigError: the message says why.
    """
    backend = None if config is None else backend_of(config)
    if backend is None:
        raise ConfigError(
            "mixed (--mixed) decides how the base is quantized: name the quantizer of a full-precision model "
            "(--base torchao-int3)."
        )
    partner = backend.partner(config)
    if isinstance(partner, Unavailable):
        raise ConfigError(f"mixed (--mixed) cannot be used with a {method_of(config)} base: {partner.reason}.")


def plan_mixture(
    model: nn.Module,
    config: Any,
    load: Callable[[Any], nn.Module],
    *,
    reference: Any,
    request: CorrectionRequest,
    tokenizer: Any = None,
    **place: Any,
) -> Mixture | None:
    """Divide the budget of a request between bits and ranks, by what each is measured to gain on held-out text.

    The ranks are those of a correction of `model` within the whole budget. It is detached again.

    Args:
        model: the base as `config` quantizes it, without a correction.
        config: a quantization config that `check_mixable` accepts.
        load: function that takes another quantization config, and returns the base quantized with it.
        reference, request, tokenizer: see `glowq.correct`. The budget counts bytes above those of `model`.
        **place: revision, subfolder and variant, see `glowq.correct`.

    Returns:
        The plan; None if no group gains more by bits than by ranks, so that `model` itself is to be corrected.

    Raises:
        GlowQError: see `glowq.correct` and `measure_wider`.
    """
    backend = backend_of(config)
    assert backend is not None
    assert request.budget is not None
    base_bytes = packed_bytes(model)
    available = parse_budget(request.budget, base_bytes)
    sequences = calibration_sequences(model, request, tokenizer)
    plain = replace(request, calibration=sequences, mixed=False, distill=0, force=True)
    ranks: list[GroupGains] = []
    try:
        ranks = correct(model, reference=reference, tokenizer=tokenizer, request=plain, **place).group_gains
    except NoGainError:
        pass  # bits may gain all the same
    finally:
        detach(model)
    groups = traced(model, sequences).groups
    _, held = split_sequences(sequences, get_method(request.method), request.ranks, request.factor_dtype, request.seed)
    assert held is not None  # a budget needs it
    partner = backend.partner(config)
    wider = None if partner is None else load(partner)
    device = getattr(model, "device", None)
    with Reference(reference, type(model), device, fresh=model, variant=place.get("variant")) as source:
        source.check_runs(next(examples(held)))
        measured = measure_wider(model, wider, source, groups, held)
    steps = {entry.group.name: Step(entry.group.name, 1, entry.bytes, entry.gain) for entry in measured}
    # The correction that follows needs one step of ranks, or it would be refused.
    form = FactorForm(bits_of(request.factor_dtypes[-1]), factor_dtype(model).itemsize)
    least = request.rank_step * min(form.rank_bytes(group.widths) for group in groups)
    found = divide(ranks, steps, available - least, rank_step=request.rank_step, max_rank=request.max_rank)
    wide = tuple(group for group in groups if group.name in found.wider)
    if not wide:
        return None
    left = available - found.wider_bytes
    return Mixture(mixed_config(model, config, wide), wide, found.wider_bytes, base_bytes, left, found.rank_bytes > 0)
