"""A module's `forward`, replaced for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModuleError

__all__ = ["evaluating", "example_inputs", "refuse_encoder_decoder", "replaced_forward", "to_model"]


def refuse_encoder_decoder(model: nn.Module) -> None:
    """Refuse a model that runs on text for its encoder and other text for its decoder, and was given the first alone.

    An encoder that is used alone, such as T5EncoderModel, is none, whatever its config says of the whole.

    Raises:
        UnsupportedModuleError: the model is an encoder with a decoder.
    """
    said = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if said and "decoder_input_ids" in signature(type(model).forward).parameters:
        raise UnsupportedModuleError(
            f"{type(model).__name__} is an encoder with a decoder, which cannot be corrected yet: calibration text "
            "gives no decoder input. Correct a model that is a decoder or an encoder alone."
        )


def to_model(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The batch on the device of the model's embeddings."""
    embeddings = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else model
    device = next(iter(embeddings.parameters())).device
    return dict(batch) if device.type == "meta" else {name: value.to(device) for name, value in batch.items()}


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, `module` runs `forward`; afterwards what it ran before, one that was put on the instance included."""
    earlier = vars(module).get("forward")  # accelerate puts its own there
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
    """Evaluation mode and no key/value cache inside; afterwards every module and config is as it was."""
    training = {module: module.training for module in model.modules()}
    configs = [getattr(module, "config", None) for module in training]  # a part of the model can have its own
    caching = {id(config): config for config in configs if getattr(config, "use_cache", None)}.values()
    try:
        model.eval()
        for config in caching:
            config.use_cache = False  # type: ignore[union-attr]
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for config in caching:
            config.use_cache = True  # type: ignore[union-attr]


def example_inputs(model: Any) -> dict[str, Any]:
    """The arguments of one forward that transformers keeps for every architecture, on the device of `model`."""
    inputs = {name: value.to(model.device) for name, value in model.dummy_inputs.items()}
    if model.config.is_encoder_decoder and "input_ids" in inputs:
        inputs.setdefault("decoder_input_ids", inputs["input_ids"])
    return inputs
