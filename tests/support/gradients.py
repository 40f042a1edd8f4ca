"""A module through which no gradient of the loss passes, as kernels without a backward pass let none through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["cut_gradient"]


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return None


def cut_gradient(module: nn.Module) -> Any:
    """Let no gradient pass from the module to its input. Return the handle that undoes this."""
    return module.register_forward_pre_hook(lambda module, args: (_Cut.apply(args[0]), *args[1:]))
