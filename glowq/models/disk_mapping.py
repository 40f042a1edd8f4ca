"""Models whose weights stay on disk: accelerate brings those of a layer into memory for the layer's forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from ..utils.logging import quiet

__all__ = ["add_weight", "compute_on", "quiet_loading"]


def add_weight(model: nn.Module, name: str, value: Tensor) -> None:
    """Add a weight to those that accelerate gives to the layers of a model whose weights are on disk."""
    hook: Any = model.get_submodule(name.rpartition(".")[0])._hf_hook
    for part in hook.hooks if isinstance(hook, SequentialHook) else [hook]:
        if isinstance(part, AlignDevicesHook):
            stored: Any = part.weights_map
            stored.dataset.state_dict[name] = value.cpu()


def compute_on(model: nn.Module, device: torch.device) -> None:
    """Let a model whose weights are on disk compute on `device`: accelerate takes the CPU where nothing is on a GPU."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in hook.hooks if isinstance(hook, SequentialHook) else [hook]:
            if isinstance(part, AlignDevicesHook):
                part.execution_device = device
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


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
