"""Preparations for a forward of a model: its inputs, mode and gradients, and another `forward` for a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import nn
from transformers import PreTrainedModel

from ..errors import SensitivityError, UnsupportedModuleError
from .dequantized import dequantized
from .fast_products import fast_products

__all__ = [
    "differentiable",
    "evaluating",
    "example_inputs",
    "input_embeddings",
    "refuse_encoder_decoder",
    "refuse_other_inputs",
    "replaced_forward",
    "to_model",
]

_NO_TEXT = ("pixel_values", "input_features", "input_values")


def refuse_encoder_decoder(model: nn.Module) -> None:
    """Raise an error for an encoder with a decoder, because calibration text gives no input for the decoder.

    The encoder of such a model alone, for example T5EncoderModel, is accepted, although its config describes the whole
    model.

    Raises:
        UnsupportedModuleError: the model is an encoder with a decoder.
    """
    declared = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if declared and "decoder_input_ids" in signature(type(model).forward).parameters:
        raise UnsupportedModuleError(
            f"{type(model).__name__} is an encoder with a decoder, which cannot be corrected yet: calibration text "
            "gives no decoder input. Correct a model that is a decoder or an encoder alone."
        )


def refuse_other_inputs(model: nn.Module) -> None:
    """Raise an error for a model that reads images or sound, which calibration text is not.

    Raises:
        UnsupportedModuleError: the message names the inputs.
    """
    main = getattr(model, "main_input_name", "input_ids")
    others = [name for name in _NO_TEXT if name in signature(type(model).forward).parameters]
    if main not in ("input_ids", "inputs_embeds") or others:
        raise UnsupportedModuleError(
            f"{type(model).__name__} reads {', '.join(others or [main])}, and calibration text gives only token ids: "
            "such a model cannot be corrected yet. Correct its text part alone, if it has one."
        )


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
    """Return the batch on the device where the model's embeddings compute, also if their weight is offloaded."""
    found = input_embeddings(model)
    embeddings = model if found is None else found
    device: Any = next(iter(embeddings.parameters())).device
    if has_offloaded_params(embeddings):
        hook: Any = embeddings._hf_hook
        device = hook.execution_device
    return {name: value.to(device) for name, value in batch.items()}


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
    """Inside this context, the outputs of the input embeddings take gradients, and no parameter does."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = input_embeddings(model)
    if embeddings is None:
        raise SensitivityError(f"{type(model).__name__} has no input embeddings that a gradient could flow from.")
    handle = embeddings.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def example_inputs(model: Any) -> dict[str, Any]:
    """Return example arguments of one forward, on `model`'s device: those that transformers has for every architecture.

    For a model that reads images or sound they are zeros of the shape that its config states.
    """
    config, main = model.config, model.main_input_name
    inputs = model.dummy_inputs if main in ("input_ids", "inputs_embeds") else {main: _zeros(main, config)}
    if config.is_encoder_decoder:
        tokens = inputs.get("input_ids", torch.zeros(1, 4, dtype=torch.int64))
        inputs.setdefault("decoder_input_ids", tokens)
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def _zeros(name: str, config: Any) -> torch.Tensor:
    """An input of zeros: an image, the spectrum of a sound, or a second of sound at 16 kHz."""
    if name == "input_features":
        return torch.zeros(1, config.num_mel_bins, 2 * getattr(config, "max_source_positions", 1500))
    if name == "input_values":
        return torch.zeros(1, 16_000)
    part = getattr(config, "vision_config", config)
    size = getattr(part, "image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.zeros(1, getattr(part, "num_channels", 3), height, width)
