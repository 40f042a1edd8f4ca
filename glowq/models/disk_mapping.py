"""Models whose weights stay on disk: accelerate brings those of a layer into memory for the layer's forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from ..quantizers.experts import tensor_holder
from ..utils.logging import quiet

__all__ = ["add_weight", "compute_on", "quiet_loading", "readable", "unstored"]


def add_weight(model: nn.Module, name: str, value: Tensor) -> None:
    """Add a weight to those that accelerate gives to the layers of a model whose weights are on disk."""
    for part in _hooks(model.get_submodule(name.rpartition(".")[0])):
        if isinstance(part, AlignDevicesHook):
            stored: Any = part.weights_map
            stored.dataset.state_dict[name] = value.cpu()


def unstored(model: nn.Module) -> list[str]:
    """Names of the weights on disk that no file holds: some models compute them when they are made, and save none."""
    found = []
    for name, module in model.named_modules():
        for part in _hooks(module):
            if isinstance(part, AlignDevicesHook) and part.weights_map is not None:
                stored: Any = part.weights_map
                own = [key for key, value in module.named_parameters(recurse=False) if value.is_meta]
                keys = {f"{name}.{key}".removeprefix("."): f"{stored.prefix}{key}" for key in own}
                known = (stored.dataset.state_dict, stored.dataset.index)
                found += [full for full, key in keys.items() if not any(key in names for names in known)]
    return found


def compute_on(model: nn.Module, device: torch.device) -> None:
    """Let a model whose weights are on disk compute on `device`: accelerate takes the CPU where nothing is on a GPU."""
    for module in model.modules():
        for part in _hooks(module):
            if isinstance(part, AlignDevicesHook):
                part.execution_device = device
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def readable(module: nn.Module) -> AbstractContextManager[None]:
    """Inside this context, the weights of a module can be read; offloaded ones are on the CPU."""
    holder = tensor_holder(module)
    context: AbstractContextManager[None] = align_module_device(
        holder, torch.device("cpu") if has_offloaded_params(holder) else None
    )
    return context


def _hooks(module: nn.Module) -> Sequence[Any]:
    """The hooks that accelerate gave to a module."""
    hook: Any = getattr(module, "_hf_hook", None)
    return hook.hooks if isinstance(hook, SequentialHook) else [hook]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide the progress bar of loading, and the warning that weights stay on disk: the model is only mapped."""
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with quiet("accelerate.big_modeling"):
            yield
    finally:
        if bars:
            hf_logging.enable_progress_bar()
