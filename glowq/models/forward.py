"""Preparations for a forward of a model: its inputs, mode and gradients, and another `forward` for a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModuleError
from ..quantizers.model import quantized_modules
from .dequantized import dequantized
from .fast_products import fast_products

__all__ = [
    "REFUSALS",
    "differentiable",
    "evaluating",
    "example_inputs",
    "input_embeddings",
    "input_shape",
    "linear_names",
    "replaced_forward",
    "to_model",
]


REFUSALS = (ValueError, TypeError, AttributeError)
"""What forwards of transformers raise for want of another input."""


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The layer that turns token ids into vectors; None if the model has none, or does not say which it is."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        found: Any = model.get_input_embeddings()
    except NotImplementedError:  # several towers, or no token ids
        return None
    return found if isinstance(found, nn.Module) else None


def to_model(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the batch on the device where the model's embeddings compute, also if their weight is offloaded.

    Values that are no whole numbers, such as those of an image, get the model's dtype.
    """
    found = input_embeddings(model)
    embeddings = model if found is None else found
    device: Any = next(iter(embeddings.parameters())).device
    if has_offloaded_params(embeddings):
        hook: Any = embeddings._hf_hook
        device = hook.execution_device
    dtype = model.dtype if isinstance(model, PreTrainedModel) else None
    return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in batch.items()}


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside this context, `module` runs `forward`. Its earlier forward is restored, also one set on the instance."""
    earlier = vars(module).get("forward")  # accelerate sets its own forward on the instance
    module.forward = forward
    try:
        yield
    finally:
        if earlier is None:
            del module.forward
        else:
            module.forward = earlier


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside this context, the model is in evaluation mode without a key/value cache; both are restored at the end.

    On a CPU it runs as fast as it can, and answers the same but for rounding: see `glowq.models.fast_products` and
    `glowq.models.dequantized`.
    """
    training = {module: module.training for module in model.modules()}
    configs = [getattr(module, "config", None) for module in training]  # parts of a model can have their own
    caching = {id(config): config for config in configs if getattr(config, "use_cache", None)}.values()
    try:
        model.eval()
        for config in caching:
            config.use_cache = False  # type: ignore[union-attr]
        with fast_products(model), dequantized(model):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for config in caching:
            config.use_cache = True  # type: ignore[union-attr]


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Inside this context, every linear layer's output takes a gradient, and no parameter does.

    The gradients start at the output of the input embeddings; and for layers that nothing leads to from there, such as
    those that read an image, at the layer's own input.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = input_embeddings(model)
    hooks = [] if embeddings is None else [embeddings.register_forward_hook(_with_gradient)]
    hooks += [model.get_submodule(name).register_forward_pre_hook(_input_with_gradient) for name in linear_names(model)]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def _with_gradient(module: nn.Module, args: Any, output: Any) -> Any:
    # A copy, because some models write into it, which is not allowed where a gradient starts.
    return output.detach().requires_grad_().clone() if isinstance(output, torch.Tensor) else output


def _input_with_gradient(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not torch.is_grad_enabled() or not args or not isinstance(args[0], torch.Tensor) or args[0].requires_grad:
        return None
    return (args[0].detach().requires_grad_(), *args[1:]) if args[0].is_floating_point() else None


def linear_names(model: nn.Module) -> list[str]:
    """Names of the quantized modules of a model, and of its linear layers."""
    plain = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return list(dict.fromkeys([*quantized_modules(model), *plain]))


def example_inputs(model: Any) -> dict[str, Any]:
    """Return example arguments of one forward, on `model`'s device: those that transformers has for every architecture.

    For a model that reads images or sound they are zeros of the shape that its config states.

    Raises:
        UnsupportedModuleError: its config states none.
    """
    config, main = model.config, model.main_input_name
    if main in ("input_ids", "inputs_embeds"):
        inputs = model.dummy_inputs
    else:
        shape = input_shape(main, config)
        if shape is None:
            raise UnsupportedModuleError(f"the config of {type(model).__name__} does not say the shape of its {main}.")
        inputs = {main: torch.zeros(shape)}
    if config.is_encoder_decoder:
        tokens = inputs.get("input_ids", torch.zeros(1, 4, dtype=torch.int64))
        inputs.setdefault("decoder_input_ids", tokens)
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def input_shape(name: str, config: Any) -> tuple[int, ...] | None:
    """The shape of an input: an image, the spectrum of a sound, or a second of sound at 16 kHz; None if not known."""
    if name == "input_features":
        bins = getattr(config, "num_mel_bins", None)
        return None if bins is None else (1, bins, 2 * getattr(config, "max_source_positions", 1500))
    if name == "input_values":
        return 1, 16_000
    part = getattr(config, "vision_config", config)
    size = getattr(part, "image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return 1, getattr(part, "num_channels", 3), height, width
