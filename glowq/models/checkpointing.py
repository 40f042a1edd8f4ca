"""Activation checkpointing of a model's blocks, whatever put their forwards there."""

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
    """Inside, the backward pass runs each block's forward again instead of keeping what it computed.

    What is kept is a block's input. The numbers are the same, bit for bit; the time is one more forward.
    """
    with ExitStack() as stack:
        for block in {id(block): block for block in map(model.get_submodule, blocks(model))}.values():
            # Whole forwards are run again: hooks that bring a module's weights in must take them out, too.
            again = partial(checkpoint, block.forward, use_reentrant=False, early_stop=False)
            stack.enter_context(replaced_forward(block, again))
        yield


def is_large(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the backward pass of the largest batch would keep so much that each block is better run again: 1 GiB."""
    return kept_bytes(model, batches) > _KEPT_BYTES


def kept_bytes(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> int:
    """About what the backward pass of the largest batch would keep: twice every linear module's inputs and outputs.

    Twice, because norms, activation functions and attention keep theirs as well.
    """
    quantized = quantized_modules(model)
    widths = sum(sum(backend.features(model.get_submodule(name))) for name, backend in quantized.items())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in quantized:
            widths += module.in_features + module.out_features
    itemsize = getattr(model, "dtype", torch.float32).itemsize
    return 2 * widths * itemsize * max((_tokens(batch) for batch in batches), default=0)


def _tokens(batch: Mapping[str, Any]) -> int:
    """Rows of the batch: its ids, or what stands for them, without the width."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    return max((value.shape[:2].numel() for value in tensors), default=0)
