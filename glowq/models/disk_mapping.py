"""Models whose weights stay on disk: accelerate brings those of a layer into memory for the layer's forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import logging as hf_logging

from ..quantizers.experts import tensor_holder
from ..utils.logging import quiet

__all__ = ["add_weight", "compute_on", "keep_read_elsewhere", "quiet_loading", "readable", "unstored"]


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


def keep_read_elsewhere(model: nn.Module, run: Callable[[], object]) -> list[Tensor]:
    """Keep in memory the weights that are used while the layer they belong to is not called.

    accelerate brings the weights of a layer into memory for the layer's own forward. The code of some models reads a
    weight of another layer, which is a meta tensor then: torch refuses some operations on it, and others, such as the
    product of a matrix with it, return memory that nothing was written to. The code of others moves a tensor to the
    device of such a weight; which weight it was cannot be told, so that all are kept.

    Args:
        model: a model whose weights are on disk.
        run: runs the model; called again until nothing on disk is read.

    Returns:
        The weights that are in memory now.

    Raises:
        Exception: what `run` raised without such a weight.
    """
    kept: list[Tensor] = []
    while True:
        failure = None
        with _ReadsElsewhere(model) as reads:
            try:
                run()
            except Exception as error:
                failure = error
        found = reads.owners or ([module for module in model.modules() if _offloading(module)] if reads.others else [])
        if not found:
            if failure is not None:
                raise failure
            return kept
        for module in found:
            for part in _offloading(module):
                part.pre_forward(module)
                part.offload = False
            kept += module.parameters(recurse=False)


class _ReadsElsewhere(TorchDispatchMode):
    """Finds the modules whose weights an operation reads while they are on disk.

    Attributes:
        owners: these modules.
        others: whether a meta tensor was read that is no weight: what was computed from one, or moved to its device.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owners: list[nn.Module] = []
        self.others = False
        self._model = model

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:  # a view reads no values
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and value.is_meta:
                    self._add_owners(StorageWeakRef(value.untyped_storage()))
        return func(*args, **(kwargs or {}))

    def _add_owners(self, storage: StorageWeakRef) -> None:
        """Add the modules with a weight in `storage`."""
        found = [module for module in self._model.modules() if _lies_in(storage, module)]
        self.owners += [module for module in found if module not in self.owners]
        self.others |= not found


def _lies_in(storage: StorageWeakRef, module: nn.Module) -> bool:
    on_disk = [weight for weight in module.parameters(recurse=False) if weight.is_meta]
    return any(StorageWeakRef(weight.untyped_storage()) == storage for weight in on_disk)


def _offloading(module: nn.Module) -> list[AlignDevicesHook]:
    """The hook that brings the weights of a module into memory for its forward, if it has one."""
    return [part for part in _hooks(module) if isinstance(part, AlignDevicesHook) and part.offload]


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
