"""The hook that corrects a member's output with its group's factors."""

from __future__ import annotations

import weakref
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from .container import SharedCorrection

__all__ = ["MemberHook"]

_HOOKS_OF_EVERY_MODULE = torch.nn.modules.module._global_forward_hooks


class MemberHook:
    """A member's forward hook; an object rather than a closure, so that models stay picklable."""

    def __init__(self, container: SharedCorrection, index: int) -> None:
        self.container = container
        self.index = index
        self._settled: dict[int, weakref.ref[Tensor]] = {}  # by thread

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and self._settled and self._is_settled(args):
            return output
        if not self.container.enabled:
            return output
        # Another hook may have kept the output; nobody else has seen it.
        alone = len(module._forward_hooks) == 1 and not _HOOKS_OF_EVERY_MODULE
        return self.container.forward(self.index, args[0], output, in_place=alone)

    def settle(self, x: Tensor) -> None:
        """Leave the output of the forward that is running as it is: the correction is in it.

        Args:
            x: the input that the forward was called with, the very object.
        """
        self._settled[get_ident()] = weakref.ref(x)

    def _is_settled(self, args: tuple[Any, ...]) -> bool:
        seen = self._settled.pop(get_ident(), None)
        return seen is not None and bool(args) and seen() is args[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_settled": {}}
