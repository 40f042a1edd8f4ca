"""Groups of a quantized model that could have more bits: what each costs in bytes, and what it gains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..calibration.weight_gains import Weights, measure_weights
from ..data.inputs import Samples
from ..factors.group import Group
from ..models.reference import Reference
from ..quantizers.model import quantized_modules, read_weight
from ..quantizers.registry import backend_of
from ..selection.allocation import Step, allocate

__all__ = ["WiderGroup", "best_within", "linear_bytes", "measure_wider", "mixed_config"]


@dataclass(frozen=True)
class WiderGroup:
    """A group that could have more bits.

    Attributes:
        group: the group.
        bytes: bytes that its members would take above those that they take now.
        gain: see `glowq.calibration.weight_gains.measure_weights`.
    """

    group: Group
    bytes: int
    gain: float


def linear_bytes(model: nn.Module, names: Iterable[str]) -> int:
    """Bytes of these linear modules: packed ones at their nominal width with their scales, others as they are."""
    quantized = quantized_modules(model)
    found = 0
    for name in names:
        module: Any = model.get_submodule(name)
        weight = module.weight if name not in quantized else None
        found += quantized[name].packed_bytes(module) if weight is None else weight.numel() * weight.element_size()
    return found


def measure_wider(
    model: nn.Module, wider: nn.Module | None, source: Reference, groups: Sequence[Group], sequences: Samples
) -> list[WiderGroup]:
    """Measure what every group gains with the weights that its members have in a wider model.

    Args:
        model: quantized model without a correction.
        wider: the same model, quantized with more bits; None for the weights of the reference in the model's dtype.
        source: the opened reference.
        groups: groups in the order in which the forward calls them.
        sequences: token ids that are not calibrated on, shape (n, length), int64.

    Returns:
        One entry per group, in the same order.

    Raises:
        GlowQError: see `read_weight`, `Reference.weight` and `measure_weights`.
    """
    dtype = getattr(model, "dtype", torch.float32)

    def added(group: Group) -> int:
        dense = dtype.itemsize * group.in_features * sum(group.out_features)
        return (dense if wider is None else linear_bytes(wider, group.members)) - linear_bytes(model, group.members)

    more = None if wider is None else _weights_of(wider)
    gains = measure_weights(model, source.model, groups, _weights_of(model), source.weight, more, sequences)
    return [WiderGroup(group, added(group), gains[group.name]) for group in groups]


def _weights_of(model: nn.Module) -> Weights:
    backends = quantized_modules(model)
    return lambda name, shape: read_weight(backends[name], name, model.get_submodule(name))


def mixed_config(model: nn.Module, config: Any, wide: Sequence[Group]) -> Any:
    """The quantization config of a model in which some groups have more bits.

    Args:
        model: the model as `config` quantizes it.
        config: a transformers quantization config whose backend can mix, see `Backend.partner`.
        wide: the groups with more bits, at least one.
    """
    backend, quantized = backend_of(config), quantized_modules(model)
    assert backend is not None
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    wide_names = [name for group in wide for name in group.members]
    others = [name for name in quantized if name not in wide_names]
    dense = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in quantized
    ]
    # Another class of the same model, such as the one without a head, has other prefixes.
    return backend.mixed(
        config, *([name.removeprefix(prefix) for name in names] for names in (wide_names, others, dense))
    )


def best_within(groups: Sequence[WiderGroup], available: int) -> list[WiderGroup]:
    """The groups that gain most for their bytes with more bits; a group that no longer fits is left out.

    Args:
        groups: measured groups; those without a gain are never chosen.
        available: bytes.
    """
    steps = [Step(entry.group.name, 1, entry.bytes, entry.gain) for entry in groups if entry.gain > 0]
    steps.sort(key=lambda step: (-step.gain / step.bytes, step.name))
    names = {step.name for step in allocate(steps, available)}
    return [entry for entry in groups if entry.group.name in names]
