"""A corrected model as a dense one: W' = Q + A B in place of every quantized module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..backends import Backend, quantized_modules, read_weight
from ..runtime import attached_factors, detach

__all__ = ["fold"]


def fold(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every quantized module of `model` by a `nn.Linear` that holds its weight and its correction.

    Args:
        dtype: of the new weights; the model's own unless given.
    """
    dtype = dtype or getattr(model, "dtype", None) or torch.float32
    added = {
        member: left.float() @ entry.right.float()
        for entry in attached_factors(model)
        for member, left in entry.lefts.items()
    }
    detach(model)
    for name, backend in quantized_modules(model).items():
        model.set_submodule(name, _dense(backend, name, model.get_submodule(name), added.get(name), dtype))


def _dense(backend: Backend, name: str, module: nn.Module, added: Any, dtype: torch.dtype) -> nn.Linear:
    weight = read_weight(backend, name, module)
    if added is not None:
        weight = weight + added.to(weight.device)
    bias = module.bias
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)  # type: ignore[operator]
    return linear
