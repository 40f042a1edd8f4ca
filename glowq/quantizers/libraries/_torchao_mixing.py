"""torchao configs that are made from another: with smaller groups, with more bits, or with both widths in one model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..base import Unavailable, changed

__all__ = ["NEXT_BITS", "finer", "mixed", "wider"]

NEXT_BITS = {1: 2, 2: 3, 3: 4, 4: 8, 5: 8, 6: 8, 7: 8}
"""Bit width of torchao's integers -> the next larger one that it has a config for."""

_LEAST_GROUP = 32  # of torchao's packed int4


def finer(config: Any) -> Any | Unavailable:
    """See `Backend.finer`."""
    from torchao.quantization.granularity import PerGroup

    kind = config.quant_type
    size = getattr(getattr(kind, "granularity", None), "group_size", getattr(kind, "group_size", None))
    if size is None:
        return Unavailable(f"torchao's {type(kind).__name__} has no groups, but a scale for each row")
    if size % 2 or (type(kind).__name__ == "Int4WeightOnlyConfig" and size <= _LEAST_GROUP):
        return Unavailable(f"torchao's {type(kind).__name__} has no smaller groups than {size}")
    grouped = isinstance(getattr(kind, "granularity", None), PerGroup)
    half = {"granularity": PerGroup(size // 2)} if grouped else {"group_size": size // 2}
    return changed(config, quant_type=replace(kind, **half))


def wider(config: Any) -> Any | Unavailable:
    """See `Backend.wider`."""
    import torch
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.quant_primitives import MappingType

    kind = config.quant_type
    if isinstance(kind, IntxWeightOnlyConfig):
        bits = NEXT_BITS.get(int(str(kind.weight_dtype).removeprefix("torch.int")))
    else:
        bits = 8 if isinstance(kind, Int4WeightOnlyConfig) else None
    if bits is None:
        return Unavailable(f"torchao has no config with the next larger bit width of {type(kind).__name__}")
    if bits == 8:
        return changed(config, quant_type=Int8WeightOnlyConfig())
    # As in the presets: only with 2 bits would a symmetric mapping leave one of four levels unused.
    mapping = MappingType.ASYMMETRIC if bits == 2 else MappingType.SYMMETRIC
    return changed(config, quant_type=replace(kind, weight_dtype=getattr(torch, f"int{bits}"), mapping_type=mapping))


def mixed(config: Any, wide: Any, names: Sequence[str], others: Sequence[str]) -> Any:
    """See `Backend.mixed`.

    The patterns name parameters, not modules: transformers would quantize the bias of a module that is named.
    """
    from torchao.quantization import FqnToConfig

    settings = {_pattern(re.escape(name)): wide.quant_type for name in names}
    settings |= {_pattern(_of_any_number(name)): config.quant_type for name in others}
    return changed(config, quant_type=FqnToConfig(fqn_to_config=settings))


def _of_any_number(name: str) -> str:
    """A pattern for all modules of one kind: "layers.0.mlp.up_proj" and that of every other layer."""
    return r"\.".join(r"\d{1,4}" if part.isdigit() else re.escape(part) for part in name.split("."))


def _pattern(name: str) -> str:
    """torchao's pattern for a module's weight, whose name may follow the model's prefix. The first match counts."""
    return rf"re:(.+\.)?{name}\.weight"
