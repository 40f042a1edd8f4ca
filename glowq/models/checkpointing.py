"""Activation checkpointing of a model's blocks, also if another library replaced their forwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..quantizers.model import quantized_modules
from .blocks import blocks
from .forward import replaced_forward

__all__ = ["is_large", "kept_bytes", "recomputing"]

_KEPT_BYTES = 2**30


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Inside this context, the backward pass runs each block's forward again instead of keeping its activations.

    Only the input of each block is kept. The results are the same, bit for bit; it takes the time of one more forward.
    """
    with ExitStack() as stack:
        for block in {id(block): block for block in map(model.get_submodule, blocks(model))}.values():
            # early_stop=False runs the whole forward again: hooks that load a module's weights must also unload them.
            again = partial(checkpoint, block.forward, use_reentrant=False, early_stop=False)
            stack.enter_context(replaced_forward(block, again))
        yield


def is_large(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the backward pass of the largest batch would keep more than 1 GiB, so that blocks should be run again."""
    return kept_bytes(model, batches) > _KEPT_BYTES


def kept_bytes(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> int:
    """Estimate the bytes that the backward pass of the largest batch would keep.

    The estimate is twice the inputs and outputs of every linear module, because norms, activation functions and
    attention keep activations as well.
    """
    quantized = quantized_modules(model)
    widths = sum(sum(backend.features(model.get_submodule(name))) for name, backend in quantized.items())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in quantized:
            widths += module.in_features + module.out_features
    itemsize = getattr(model, "dtype", torch.float32).itemsize
    return 2 * widths * itemsize * max((_tokens(batch) for batch in batches), default=0)


def _tokens(batch: Mapping[str, Any]) -> int:
    """Number of tokens in the batch, from the first two dimensions of its ids or of the tensor used in their place."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    return max((value.shape[:2].numel() for value in tensors), default=0)
