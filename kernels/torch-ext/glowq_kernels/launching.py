"""Imports the modules that need triton at the first launch, so that importing the package does not need triton."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from .availability import unavailable
from .checks import KernelError

_GPUS = {"cuda": torch.cuda, "xpu": getattr(torch, "xpu", None)}


def kernels(name: str, tensor: Tensor) -> ModuleType:
    """Import the module of this name, which needs triton, for a launch on the device of `tensor`.

    Raises:
        KernelError: triton is missing, or does not run on that device.
    """
    try:
        module = importlib.import_module(f".{name}", __package__)
        interpreted = importlib.import_module(".triton_left", __package__).INTERPRETED
    except (ImportError, AttributeError) as error:  # a triton that is too old raises AttributeError
        raise KernelError(f"The kernels cannot run here: {unavailable() or error}") from error
    if not interpreted and tensor.device.type not in _GPUS:
        raise KernelError(
            f"the kernels run on a CUDA, ROCm or XPU device, found tensors on {tensor.device}; move them, or use the "
            "functions of `twins`."
        )
    return module


def device(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which the device of `tensor` is current: triton launches on the current device."""
    library = _GPUS.get(tensor.device.type)
    return nullcontext() if library is None else library.device(tensor.device)
