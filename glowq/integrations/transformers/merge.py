"""Merge a correction into dense weights: W' = Q + A B replaces the weight of every quantized module."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import ExportError, NonFiniteError
from ...quantizers.base import Backend
from ...quantizers.experts import ExpertLinear, close_experts
from ...quantizers.model import quantized_modules, read_weight
from ...runtime.attach import attached, attached_factors, detach

__all__ = ["cast", "merge_into_dense", "running_factors"]


def merge_into_dense(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every quantized module of `model` by a dense one with the weight W' = Q + A B.

    The dense modules have the class that they have in an unquantized model: `nn.Linear`, or `Conv1D` in GPT-2. A group
    that is switched off is not merged. Modules are replaced one by one, so that at most one weight is in memory both
    quantized and dense.

    Args:
        model: quantized, with or without a correction.
        dtype: dtype of the new weights; None takes the model's own.

    Raises:
        ExportError: a dense model of this class has no linear layer under the name of a quantized module.
        NonFiniteError: a weight is too large for `dtype`.
    """
    dtype = dtype or getattr(model, "dtype", None) or torch.float32
    factors = running_factors(model)
    detach(model)
    plain = _plain(model)
    modules = quantized_modules(model)
    for name in _merge_experts(model, modules, factors, dtype):
        del modules[name]
    for name, backend in modules.items():
        kind = _dense_class(plain, name) if plain is not None else nn.Linear
        model.set_submodule(name, _dense(backend, name, model.get_submodule(name), factors.get(name), dtype, kind))


def _merge_experts(
    model: nn.Module, modules: Mapping[str, Backend], factors: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype
) -> list[str]:
    """Merge the experts into the parameters that hold the matrices of all experts of a layer; returns their names."""
    stacks: dict[tuple[Any, str], list[str]] = {}
    for name in modules:
        layer = model.get_submodule(name)
        if isinstance(layer, ExpertLinear):
            stacks.setdefault((layer.holder, layer.stack_name), []).append(name)
    for (holder, stack_name), names in stacks.items():
        matrices = [
            cast(name, _merged(modules[name], name, model.get_submodule(name), factors.get(name)), dtype)
            for name in names
        ]
        stack = torch.stack([matrix.T if holder.is_transposed else matrix for matrix in matrices])
        setattr(holder, stack_name, nn.Parameter(stack, requires_grad=False))
    close_experts(model)
    return [name for names in stacks.values() for name in names]


def running_factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Member name -> (left factor (o, r), right factor (r, d)), for every group that is switched on."""
    running = {group for group, container in attached(model).items() if container.enabled}
    return {
        member: (left, entry.right)
        for entry in attached_factors(model)
        if entry.group.name in running
        for member, left in entry.lefts.items()
    }


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert `tensor` to another dtype.

    Raises:
        NonFiniteError: a value is too large for `dtype`.
    """
    found = tensor.to(dtype)
    if not bool(torch.isfinite(found).all()):
        raise NonFiniteError(
            f"{name} reaches {float(tensor.abs().max()):.3g}, and {str(dtype).removeprefix('torch.')} ends at "
            f"{torch.finfo(dtype).max:.3g}. Use bfloat16 or float32 (--dtype)."
        )
    return found


def _plain(model: nn.Module) -> nn.Module | None:
    """An unquantized model of the same class on the meta device; None if `model` is not a transformers model."""
    if not isinstance(model, PreTrainedModel):
        return None
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return type(model)(config)


def _dense_class(plain: nn.Module, name: str) -> type[nn.Module]:
    try:
        kind = type(plain.get_submodule(name))
    except AttributeError:
        kind = type(None)  # type: ignore[assignment]
    if not issubclass(kind, nn.Linear | Conv1D):
        raise ExportError(
            f"{name} is quantized, but a dense {type(plain).__name__} has no linear layer of that name: its library "
            "rearranged the model. Save the corrected model in one piece instead (model.save_pretrained)."
        )
    return kind


def _merged(backend: Backend, name: str, module: nn.Module, factors: tuple[Tensor, Tensor] | None) -> Tensor:
    """Q + A B, shape (o, d), float32."""
    weight = read_weight(backend, name, module)
    if factors is None:
        return weight
    left, right = (factor.to(weight.device, torch.float32) for factor in factors)
    return weight + left @ right


def _dense(
    backend: Backend,
    name: str,
    module: nn.Module,
    factors: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
    kind: type[nn.Module],
) -> nn.Module:
    weight = _merged(backend, name, module, factors)
    out_features, in_features = weight.shape
    weight = cast(name, weight, dtype)
    bias: Any = module.bias
    with torch.device("meta"):
        if issubclass(kind, Conv1D):
            dense: nn.Module = Conv1D(out_features, in_features)
            weight = weight.T.contiguous()
        else:
            dense = nn.Linear(in_features, out_features, bias=bias is not None)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(cast(f"{name}.bias", bias.detach(), dtype), requires_grad=False)
    return dense
