"""A corrected model as a dense one: W' = Q + A B in place of every quantized module."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import ExportError, NonFiniteError
from ...quantizers.base import Backend
from ...quantizers.model import quantized_modules, read_weight
from ...runtime.attach import attached, attached_factors, detach

__all__ = ["cast", "merge_into_dense", "running_factors"]


def merge_into_dense(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every quantized module of `model` by one that holds its weight and its correction.

    The new modules are those that a model of this class has where nothing is quantized: `nn.Linear`, or GPT-2's
    `Conv1D`. A group that is switched off is not merged. Of the dense weights that are not yet in place, one at a
    time is held.

    Args:
        dtype: of the new weights; the model's own unless given.

    Raises:
        ExportError: a quantized module has no place in a dense model of this class.
        NonFiniteError: a weight is too large for `dtype`.
    """
    dtype = dtype or getattr(model, "dtype", None) or torch.float32
    factors = running_factors(model)
    detach(model)
    plain = _plain(model)
    for name, backend in quantized_modules(model).items():
        place = _place(plain, name) if plain is not None else nn.Linear
        model.set_submodule(name, _dense(backend, name, model.get_submodule(name), factors.get(name), dtype, place))


def running_factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Member name -> left (o, r) and right factor (r, d) of every group that is switched on."""
    running = {group for group, container in attached(model).items() if container.enabled}
    return {
        member: (left, entry.right)
        for entry in attached_factors(model)
        if entry.group.name in running
        for member, left in entry.lefts.items()
    }


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in another dtype.

    Raises:
        NonFiniteError: a value is too large for it.
    """
    found = tensor.to(dtype)
    if not bool(torch.isfinite(found).all()):
        raise NonFiniteError(
            f"{name} reaches {float(tensor.abs().max()):.3g}, and {str(dtype).removeprefix('torch.')} ends at "
            f"{torch.finfo(dtype).max:.3g}. Use bfloat16 or float32 (--dtype)."
        )
    return found


def _plain(model: nn.Module) -> nn.Module | None:
    """The same class of model without quantization, without weights; None for what is no transformers model."""
    if not isinstance(model, PreTrainedModel):
        return None
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return type(model)(config)


def _place(plain: nn.Module, name: str) -> type[nn.Module]:
    try:
        place = type(plain.get_submodule(name))
    except AttributeError:
        place = type(None)  # type: ignore[assignment]
    if not issubclass(place, nn.Linear | Conv1D):
        raise ExportError(
            f"{name} is quantized, but a dense {type(plain).__name__} has no linear layer of that name: its library "
            "rearranged the model. Save the corrected model in one piece instead (model.save_pretrained)."
        )
    return place


def _dense(
    backend: Backend,
    name: str,
    module: nn.Module,
    factors: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
    place: type[nn.Module],
) -> nn.Module:
    weight = read_weight(backend, name, module)
    if factors is not None:
        left, right = (factor.to(weight.device, torch.float32) for factor in factors)
        weight = weight + left @ right
    out_features, in_features = weight.shape
    weight = cast(name, weight, dtype)
    bias: Any = module.bias
    with torch.device("meta"):
        if issubclass(place, Conv1D):
            dense: nn.Module = Conv1D(out_features, in_features)
            weight = weight.T.contiguous()
        else:
            dense = nn.Linear(in_features, out_features, bias=bias is not None)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(cast(f"{name}.bias", bias.detach(), dtype), requires_grad=False)
    return dense
