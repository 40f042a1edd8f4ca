"""Activation checkpointing of a model's blocks, whatever put their forwards there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .backends import quantized_modules
from .groups import blocks

__all__ = ["kept_bytes", "recomputing"]


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Inside, the backward pass runs each block's forward again instead of keeping what it computed.

    What is kept is a block's input. The numbers are the same, bit for bit; the time is one more forward. Afterwards
    every block's `forward` is what it was, one that was put on the instance included.
    """
    wrapped: list[tuple[nn.Module, Any]] = []
    try:
        for name in blocks(model):
            block = model.get_submodule(name)
            if any(block is known for known, _ in wrapped):
                continue
            wrapped.append((block, vars(block).get("forward")))
            # Whole forwards are run again: hooks that bring a module's weights in must take them out, too.
            again = partial(checkpoint, block.forward, use_reentrant=False, early_stop=False)
            block.forward = again
        yield
    finally:
        for block, own in wrapped:
            if own is None:
                del block.forward
            else:
                block.forward = own


def kept_bytes(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> int:
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
