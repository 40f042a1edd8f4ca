"""Load the experts of a mixture where a library has quantized them one by one.

transformers stacks the experts' matrices into one parameter. It finds no place for the tensors of such a checkpoint,
and leaves its own parameter random.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from safetensors import safe_open
from torch import nn

from ..experts import HALVES, ExpertLinear, Layers, open_experts, stacks

__all__ = ["divide_experts", "loading_experts"]

_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.|$)")
_QUANTIZED = re.compile(r"(.*experts?)\.0\.((?:gate|up|down)_proj|w[123])\.(?!weight$|bias$)\w+$")  # of one expert


@cache
def loading_experts(quantizer: Any) -> Any:
    """A subclass of a quantizer of transformers that also loads experts which were quantized one by one.

    It is the same class at every call.
    """

    class Quantizer(quantizer):  # type: ignore[misc]
        def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> Any:
            if self.pre_quantized:
                divide_experts(model, kwargs.get("checkpoint_files") or ())
            return super()._process_model_before_weight_loading(model, **kwargs)

    Quantizer.__name__ = Quantizer.__qualname__ = f"Experts{quantizer.__name__}"
    return Quantizer


def divide_experts(model: nn.Module, files: Iterable[str]) -> None:
    """Replace the parameters of all experts by linear layers, where a checkpoint stores each expert quantized.

    Args:
        model: a model on the meta device, before a library replaces its linear layers.
        files: the checkpoint's files; those that are not safetensors are not looked into.
    """
    found = list(stacks(model))
    stored = _stored(files) if found else {}
    if not stored:
        return
    places = {module: tuple(_NUMBERS.findall(name)) for name, module in model.named_modules()}
    chosen = {id(getattr(experts, stack)): stored.get(places[experts]) for experts, stack in found}
    open_experts(model, lambda stack: chosen[id(stack)])
    for name, layer in [(name, layer) for name, layer in model.named_modules() if isinstance(layer, ExpertLinear)]:
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta", layer.weight.dtype)
        model.set_submodule(name, linear)
    for experts, stack in found:
        if places[experts] in stored:
            for parameter in (stack, f"{stack}_bias"):
                experts._parameters.pop(parameter, None)
            vars(experts)["_is_hf_initialized"] = True  # transformers would initialize the parameters


def _stored(files: Iterable[str]) -> dict[tuple[str, ...], Layers]:
    """The numbers in the name of a layer of experts -> the names of the layers of each, where they are quantized."""
    found = {}
    for file in files:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for match in filter(None, map(_QUANTIZED.match, tensors.keys())):
                    found[tuple(_NUMBERS.findall(match[1]))] = next(names for names in HALVES if match[2] in names)
    return found
