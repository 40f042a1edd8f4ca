"""Predict what more bits would undo in the bytes of a correction, from what its groups were measured to cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..artifact.config import GlowQConfig
from ..artifact.provenance import Instead
from ..factors.factors import GroupFactors
from ..quantizers.base import Unavailable
from ..quantizers.model import quantized_modules
from ..quantizers.registry import backend_of
from .wider_groups import WiderGroup, best_within

__all__ = ["predict_more_bits"]


def predict_more_bits(
    model: nn.Module, factors: Sequence[GroupFactors], available: int, total: float
) -> Instead | None:
    """Predict what the next larger width of the base would undo, for the groups that gain most by it.

    Rounding to b bits has an error in proportion to 1 / (2^b - 1), and the loss grows with its square. So a group with
    more bits keeps a known share of its loss, and in full precision nothing of it.

    Args:
        model: quantized model.
        factors: factors of all groups, with totals in one unit.
        available: bytes.
        total: loss of the whole model in the same unit.

    Returns:
        The share of the loss, and the width; None if the base cannot give some groups more bits.
    """
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    config = config.base if isinstance(config, GlowQConfig) else config
    backend = None if config is None else backend_of(config)
    if backend is None:
        return None
    partner = backend.partner(config)
    if isinstance(partner, Unavailable):
        return None
    modules = quantized_modules(model)
    dense: float = 8 * getattr(model, "dtype", torch.float32).itemsize
    groups, most = [], dense
    for entry in factors:
        members: list[Any] = [model.get_submodule(name) for name in entry.group.members]
        bits = modules[entry.group.members[0]].scheme(members[0]).bits
        wider = backend.partner_bits(bits)
        weights = entry.group.in_features * sum(entry.group.out_features)
        if wider is None:
            packed = sum(backend.packed_bytes(member) for member in members)
            groups.append(WiderGroup(entry.group, int(weights * dense / 8) - packed, entry.total))
        else:
            share = 1 - ((2**bits - 1) / (2**wider - 1)) ** 2
            groups.append(WiderGroup(entry.group, int(weights * (wider - bits) / 8), share * entry.total))
            most = wider
    undone: float = math.fsum(entry.gain for entry in best_within(groups, available))
    return {"predicted": undone / total if total > 0 else 0.0, "bits": most}
