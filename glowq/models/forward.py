"""Preparations for a forward of a model: its inputs, mode and gradients, and another `forward` for a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

from accelerate.utils import has_offloaded_params
from torch import nn
from transformers import PreTrainedModel

from ..errors import SensitivityError, UnsupportedModuleError
from .dequantized import dequantized
from .fast_products import fast_products

__all__ = ["differentiable", "evaluating", "example_inputs", "refuse_encoder_decoder", "replaced_forward", "to_model"]


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


def to_model(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the batch on the device where the model's embeddings compute, also if their weight is offloaded."""
    embeddings = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else model
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
    embeddings = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if not isinstance(embeddings, nn.Module):
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
    """Return the example arguments of one forward that transformers has for every architecture, on `model`'s device."""
    inputs = {name: value.to(model.device) for name, value in model.dummy_inputs.items()}
    if model.config.is_encoder_decoder and "input_ids" in inputs:
        inputs.setdefault("decoder_input_ids", inputs["input_ids"])
    return inputs
