"""One group's factors as a module, and the hook that corrects a member's output with them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import operators
from .errors import ConfigError
from .groups import Group

__all__ = ["MemberHook", "SharedCorrection"]

_FEW = 16  # tokens
_HOOKS_OF_EVERY_MODULE = torch.nn.modules.module._global_forward_hooks


class _Factor(nn.Module):
    """One factor as a leaf module: calling it (not reading its parameter) is what fires accelerate's offload hooks."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(factor, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return operators.right(x, self.factor)


class _Slot(NamedTuple):
    """What was computed from the input seen last, and who has used it. Replaced as a whole: threads are safe."""

    source: Any  # weakref of the input (eager) or the input itself (while tracing)
    state: tuple[Any, ...]
    found: tuple[Tensor, ...]  # the right product, or what each member adds
    used: tuple[int, ...]


class SharedCorrection(nn.Module):
    """One group's factors and the slot that lets its members share what is computed from one input.

    Made of a group, its right factor B, shape (r, d), and each member's left factor A_i, shape (o_i, r), by name.

    The slot serves a member only if the very same tensor object arrives, at the same version, under the same grad and
    autocast mode, and the member has not used it yet; the last member empties it, and so does a backward pass. Under
    `torch.inference_mode` tensors keep no version counter, so that an in-place write could not be seen: there every
    member computes its own product (`torch.no_grad`, which `generate` and pipelines use, shares).

    The members share the right product, and each writes its left product into its own output without a temporary. A
    few tokens on the CPU take as long as the calls for them do: there one call computes what all members add.
    """

    def __init__(self, group: Group, right: Tensor, lefts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.group = group
        self.rank = right.shape[0]
        self.enabled = True
        self.right = _Factor(right)
        self.lefts = nn.ModuleList(_Factor(lefts[member]) for member in group.members)
        self._factors = (self.right, *self.lefts)  # found at once, which `self.lefts[index]` is not
        self._widths = [len(lefts[member]) for member in group.members]
        self._slot: list[_Slot | None] = [None]  # set without the ceremony of a module's attribute
        self._handles: list[RemovableHandle] = []
        self._stack()

    def forward(self, index: int, x: Tensor, output: Tensor, in_place: bool = False) -> Tensor:
        """The corrected output of member number `index`.

        Args:
            index: position in `group.members`.
            x: the member's input, shape (..., d).
            output: the quantized module's output Q x, shape (..., o_i).
            in_place: whether `output` may be written to where no gradient needs it; else it may be anybody's.

        Returns:
            Q x + A_i (B x), shape and dtype of `output`.

        Raises:
            ConfigError: the factors are on another device than the input.
        """
        if torch.compiler.is_compiling():
            return (output + self._traced(index, x)).to(output.dtype)
        watched = self._is_watched()
        gradients = torch.is_grad_enabled()
        if not watched and not gradients and x.is_cpu and x.numel() <= _FEW * x.shape[-1] and not x.is_inference():
            addition = self._shared(index, x, self._additions)[index]
        else:
            (product,) = self._shared(index, x, self._product)
            if in_place and not watched and not gradients:
                operators.left_add_(output, product, self._factors[1 + index]._parameters["factor"])
                return output
            addition = self._factors[1 + index](product)
        if in_place and not (gradients and (output.requires_grad or addition.requires_grad)):
            return output.add_(addition)
        return (output + addition).to(output.dtype)

    def _shared(self, index: int, x: Tensor, compute: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if len(self._widths) == 1 or x.is_inference():
            return compute(x)
        autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        state = (compute, x._version, x.requires_grad, torch.is_grad_enabled(), autocast)
        slot = self._slot[0]
        # The state comes first: a slot that tracing left half used has none, and its source is no weak reference.
        if slot is not None and slot.state == state and slot.source() is x and index not in slot.used:
            self._slot[0] = self._used(slot, index)
            return slot.found
        found = compute(x)
        if found[0].requires_grad:
            found[0].register_hook(self._forget)  # backward frees the graph that a later member would share
        self._slot[0] = _Slot(weakref.ref(x), state, found, (index,))
        return found

    def _traced(self, index: int, x: Tensor) -> Tensor:
        # Dynamo follows neither weak references nor versions, and inductor does not merge repeated products; one
        # traced forward leaves the slot as it found it (empty), so that no guard fails on the next call. A write into
        # the input between two members goes unseen here, but `find_groups` never groups such members. An exported
        # graph is read by others: there each member keeps its own left product.
        at_once = not torch.compiler.is_exporting() and not self._is_watched()
        slot = self._slot[0]
        if slot is not None and slot.source is x and index not in slot.used:
            found = slot.found
            self._slot[0] = self._used(slot, index)
        else:
            found = self._additions(x) if at_once else (self.right(x),)
            if len(self._widths) > 1:
                self._slot[0] = _Slot(x, (), found, (index,))
        if at_once:
            return found[index]
        addition: Tensor = self._factors[1 + index](found[0])
        return addition

    def _used(self, slot: _Slot, index: int) -> _Slot | None:
        """The slot once one more member has used it: nothing, after the last."""
        if len(slot.used) + 1 == len(self._widths):
            return None
        return _Slot(slot.source, slot.state, slot.found, (*slot.used, index))

    def _product(self, x: Tensor) -> tuple[Tensor]:
        right: Any = self._factors[0]
        if not self._is_watched():
            self._check_device(x, right.factor)
        return (right(x),)

    def _additions(self, x: Tensor) -> tuple[Tensor, ...]:
        right, *lefts = (factor._parameters["factor"] for factor in self._factors)
        self._check_device(x, right)
        found = operators.correction(x, right, lefts)
        return found.split(self._widths, -1) if len(lefts) > 1 else (found,)

    def _is_watched(self) -> bool:
        """Whether a factor has to be called as a module, because somebody's hook is on it."""
        for factor in self._factors:
            state = factor.__dict__
            if state["_forward_hooks"] or state["_forward_pre_hooks"] or "_hf_hook" in state:
                return True
        return False

    def _check_device(self, x: Tensor, factor: Any) -> None:
        if x.device != factor.device:
            raise ConfigError(
                f"{self.group.name}: its factors are on {factor.device}, its input is on {x.device}: move the whole "
                "model with model.to(device), or let accelerate dispatch it before the correction is attached."
            )

    def _forget(self, gradient: Tensor) -> None:
        self._slot[0] = None

    def _stack(self) -> None:
        """Let the left factors lie one after the other in memory, so that one product serves all members."""
        factors = [left._parameters["factor"] for left in self._factors[1:]]
        for factor, piece in zip(factors, operators.stacked([factor.data for factor in factors]), strict=True):
            factor.data = piece

    def _apply(self, fn: Any, recurse: bool = True) -> SharedCorrection:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not operators.lie_together([left._parameters["factor"] for left in self._factors[1:]]):
            self._stack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slot": [None]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._stack()

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.group.name}, rank={self.rank}"


class MemberHook:
    """A member's forward hook; an object rather than a closure, so that models stay picklable."""

    def __init__(self, container: SharedCorrection, index: int) -> None:
        self.container = container
        self.index = index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self.container.enabled:
            return output
        # Another hook may have kept the output; nobody else has seen it.
        alone = len(module._forward_hooks) == 1 and not _HOOKS_OF_EVERY_MODULE
        return self.container.forward(self.index, args[0], output, in_place=alone)
