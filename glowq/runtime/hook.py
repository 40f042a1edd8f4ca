"""The hook that corrects a member's output with its group's factors."""

from __future__ import annotations

import weakref
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModuleError
from .container import SharedCorrection

__all__ = ["MemberHook"]

_HOOKS_OF_EVERY_MODULE = torch.nn.modules.module._global_forward_hooks


class MemberHook:
    """A member's forward hook. It is an object and not a closure, so that the model can be pickled."""

    def __init__(self, container: SharedCorrection, index: int) -> None:
        self.container = container
        self.index = index
        self._settled: dict[int, weakref.ref[Tensor]] = {}  # thread -> input whose output is corrected already

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """The corrected output. The hook is registered `with_kwargs`, because a member may be called by keyword."""
        if not torch.compiler.is_compiling() and self._settled and self._is_settled(args):
            return output
        if not self.container.enabled:
            return output
        # Without other hooks, no other code holds the output yet, so that it can be overwritten.
        alone = len(module._forward_hooks) == 1 and not _HOOKS_OF_EVERY_MODULE
        x = args[0] if args else self._named(kwargs)
        return self.container.forward(self.index, x, output, in_place=alone)

    def _named(self, kwargs: dict[str, Any]) -> Tensor:
        """The input of a member that was called by keyword. Its name differs from library to library."""
        tensors = [value for value in kwargs.values() if isinstance(value, Tensor)]
        if len(tensors) != 1:
            group = self.container.group
            raise UnsupportedModuleError(
                f"{group.members[self.index]} of group {group.name!r} got {len(tensors)} tensors by keyword "
                f"({', '.join(kwargs) or 'nothing'}), expected one, its input: call it with one tensor by position."
            )
        return tensors[0]

    def settle(self, x: Tensor) -> None:
        """Make the hook leave the output of the running forward unchanged, because it is corrected already.

        Args:
            x: the tensor object that the forward was called with.
        """
        self._settled[get_ident()] = weakref.ref(x)

    def _is_settled(self, args: tuple[Any, ...]) -> bool:
        seen = self._settled.pop(get_ident(), None)
        return seen is not None and bool(args) and seen() is args[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_settled": {}}
