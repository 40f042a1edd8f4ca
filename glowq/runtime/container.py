"""The factors of one group as a module, and the product that its members share in a forward."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..factors.form import dtype_name
from ..factors.group import Group
from ..factors.integers import Stored
from ..utils.places import place
from . import operators
from .factor_modules import JoinedLefts, LeftFactor, RightFactor, is_watched
from .products import FEW

__all__ = ["SharedCorrection"]


class _Handle(Protocol):
    """An object that can undo a change of a member."""

    def remove(self) -> None: ...


class _Slot(NamedTuple):
    """What was computed from the last input, and which members have used it.

    A slot is only replaced as a whole, never changed, so that threads can share it.
    """

    source: Any  # weak reference to the input (eager), or the input itself (while tracing)
    view: tuple[Any, Hashable] | None  # of an input that is a view: weak reference to the whole, and how it lies in it
    state: tuple[Any, ...]  # see `_state`
    product: Tensor | None  # the right product, if each member computes its own left product
    additions: tuple[Tensor, ...]  # otherwise the correction of each member
    used: int  # bit mask of the members that have used the slot


class SharedCorrection(nn.Module):
    """The factors of one group, and a slot in which its members share what is computed from one input.

    A member uses the slot only if its input is the same tensor object, or a view of the same part of one tensor, at the
    same version, under the same grad and autocast mode, and if it has not used the slot yet. The last member empties
    the slot, and so does a backward pass.
    Under `torch.inference_mode` tensors have no version counter, so that a write in place could not be noticed: there
    every member computes its own product. Under `torch.no_grad`, which `generate` and pipelines use, members share.

    The members share the right product, and each adds its left product to its own output in place. For a few tokens on
    the CPU, most of the time goes into the calls themselves: there one call computes the corrections of all members.

    Args:
        group: the group.
        right: right factor B, of floats, or of whole numbers with `scale`.
        lefts: member name -> left factor A_i, of the form of `right`.
        scale: scale of each row of a right factor of whole numbers, shape (r,), see `glowq.factors.integers`.
        rank: rank of the correction, if the factors are filled with ranks of zeros; None if they are not.
        bits: bits per value of factors of whole numbers as they are saved; None for floats.
    """

    def __init__(
        self,
        group: Group,
        right: Stored,
        lefts: Mapping[str, Stored],
        scale: Tensor | None = None,
        *,
        rank: int | None = None,
        bits: int | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        self.rank = right.values.shape[0] if rank is None else rank
        self.bits = bits
        self.enabled = True  # whether a forward adds the correction: `switched_on`, and no `pauses`
        self.switched_on = True  # set by `glowq.set_enabled`
        self.pauses = 0  # open contexts of `glowq.disabled`
        self.right = RightFactor(right, scale)
        held = [
            LeftFactor(lefts[member], width, scale)
            for member, width in zip(group.members, group.out_features, strict=True)
        ]
        self.lefts = nn.ModuleList(held)
        # A tuple, because an access to `self.lefts[index]` is slow.
        self._factors: tuple[RightFactor, ...] = (self.right, *self.lefts)
        self._together = JoinedLefts(held, group.out_features)
        self._members = len(group.members)
        self._slot: list[_Slot | None] = [None]  # in a list, because setting an attribute of a module is slow
        self._traced: list[_Slot | None] = [None]
        self._handles: list[_Handle] = []
        self._stack()

    def switch(self, on: bool, pauses: int) -> None:
        """Set whether the group is on, and how many contexts of `glowq.disabled` are open."""
        self.switched_on, self.pauses = on, pauses
        self.enabled = on and pauses == 0

    def forward(self, index: int, x: Tensor, output: Tensor, in_place: bool = False) -> Tensor:
        """The corrected output of member number `index`.

        Args:
            index: position in `group.members`.
            x: the member's input, shape (..., d).
            output: the quantized module's output Q x, shape (..., o_i).
            in_place: whether `output` may be overwritten if no gradient needs it; False if other code may hold it.

        Returns:
            Q x + A_i (B x), shape and dtype of `output`.

        Raises:
            ConfigError: the factors are on another device than the input.
        """
        if torch.compiler.is_compiling():
            return (output + self._trace(index, x)).to(output.dtype)
        gradients = torch.is_grad_enabled()
        slot = self._found(index, x, gradients) or self._compute(index, x, gradients)
        if slot.product is None:
            addition = slot.additions[index]
        else:
            left: Any = self._factors[1 + index]
            if in_place and not gradients and not is_watched(left):
                factor, buffers = left._parameters["factor"], left._buffers
                operators.left_add_(output, slot.product, factor, buffers["scale"], buffers["multipliers"])
                return output
            addition = left(slot.product)
        if in_place and not (gradients and (output.requires_grad or addition.requires_grad)):
            return output.add_(addition)
        return (output + addition).to(output.dtype)

    @property
    def watched(self) -> bool:
        """Whether a factor has a hook, so that the factors must be called as modules."""
        return any(map(is_watched, self._factors))

    def right_product(self, index: int, x: Tensor) -> Tensor:
        """The right product B x for member number `index`, computed once per forward for all members.

        Args:
            index: position in `group.members`.
            x: the member's input, shape (..., d).

        Returns:
            Shape (..., r).
        """
        gradients = torch.is_grad_enabled()
        slot = self._found(index, x, gradients)
        if slot is None or slot.product is None:
            slot = self._compute(index, x, gradients, at_once=False)
        assert slot.product is not None
        return slot.product

    def unshare(self, others: Iterable[Tensor]) -> None:
        """Copy the factors that share memory with `others`. A change of dtype or device has copied the rest already."""
        taken = {other.untyped_storage().data_ptr() for other in others if not other.is_meta}
        shared = [part for part in self._factors if part.factor.untyped_storage().data_ptr() in taken]
        for part in shared:
            part.factor.data = part.factor.data.clone()
        if shared:
            self._stack()

    def _found(self, index: int, x: Tensor, gradients: bool) -> _Slot | None:
        """The slot, if another member has computed it from this input and this member may use it."""
        slot = self._slot[0]
        if slot is None or slot.used & (1 << index) or slot.state != _state(x, gradients):
            return None
        if slot.source() is not x:
            return self._found_for_view(slot, index, x)
        self._slot[0] = self._used(slot, index)
        return slot

    def _found_for_view(self, slot: _Slot, index: int, x: Tensor) -> _Slot | None:
        """The slot in the shape of `x`, if its input and `x` are views of the same values."""
        source = slot.source()
        if slot.view is not None:
            root, layout = slot.view[0](), slot.view[1]
        else:
            root, layout = (None, None) if source is None else place(source)
        whole, own = place(x)
        if root is None or root is not whole or layout is None or layout != own:
            return None
        self._slot[0] = self._used(slot, index)

        def shaped(value: Tensor) -> Tensor:
            return value.reshape(*x.shape[:-1], value.shape[-1])

        product = None if slot.product is None else shaped(slot.product)
        return slot._replace(product=product, additions=tuple(map(shaped, slot.additions)))

    def _compute(self, index: int, x: Tensor, gradients: bool, at_once: bool = True) -> _Slot:
        """Compute what the members need from this input, and keep it in the slot for the other members."""
        countless, right = x.is_inference(), self._factors[0]
        factor: Any
        factor, scale, multipliers = right._parameters["factor"], right._buffers["scale"], right._buffers["multipliers"]
        watched = self.watched
        if not watched:
            self._check_device(x, factor)
        few = x.is_cpu and x.numel() <= FEW * x.shape[-1]
        if few and at_once and not (watched or gradients or countless):
            whole, left_scale, left_multipliers = self._together.tensors()
            total = operators.correction(x, factor, whole, scale, left_scale, multipliers, left_multipliers)
            product, additions = None, self._together.split(total)
        else:
            product, additions = right(x), ()
            if product.requires_grad:
                product.register_hook(self._forget)  # a later member must not share a graph that backward has freed
        if self._members == 1 or countless:
            return _Slot(None, None, (), product, additions, 0)
        whole, layout = place(x) if x._base is not None else (None, None)
        view = None if whole is None else (weakref.ref(whole), layout)
        slot = _Slot(weakref.ref(x), view, _state(x, gradients), product, additions, 1 << index)
        self._slot[0] = slot
        return slot

    def _trace(self, index: int, x: Tensor) -> Tensor:
        # Dynamo supports neither weak references nor versions, and inductor does not merge repeated products. So there
        # is a slot of its own for tracing. It is empty before and after one traced forward, so that no guard fails on
        # the next call. A write into the input between two members is not noticed here, but `find_groups` never groups
        # such members. On the CPU and for exporters, each member computes its own left product: a compiler fuses it
        # with the addition, and an exporter supports its operators.
        apart = x.device.type == "cpu" or torch.compiler.is_exporting() or self.watched
        slot = self._traced[0]
        if slot is not None and slot.source is x and not slot.used & (1 << index):
            self._traced[0] = self._used(slot, index)
        else:
            if apart:
                slot = _Slot(x, None, (), self.right(x), (), 1 << index)
            else:
                whole, *buffers = self._together.tensors()
                right = self.right
                total = operators.correction(
                    x, right.factor, whole, right.scale, buffers[0], right.multipliers, buffers[1]
                )
                slot = _Slot(x, None, (), None, self._together.split(total), 1 << index)
            if self._members > 1:
                self._traced[0] = slot
        if slot.product is None:
            return slot.additions[index]
        addition: Tensor = self._factors[1 + index](slot.product)
        return addition

    def _used(self, slot: _Slot, index: int) -> _Slot | None:
        """The slot after one more member has used it; None after the last member."""
        used = slot.used | (1 << index)
        if used == (1 << self._members) - 1:
            return None
        return slot._replace(used=used)

    def _check_device(self, x: Tensor, factor: Any) -> None:
        if x.device != factor.device:
            raise ConfigError(
                f"{self.group.name}: its factors are on {factor.device}, its input is on {x.device}: move the whole "
                "model with model.to(device), or let accelerate dispatch it before the correction is attached."
            )

    def _forget(self, gradient: Tensor) -> None:
        self._slot[0] = None

    def _stack(self) -> None:
        """Place the left factors one after the other in memory, so that all members can share one matrix product."""
        for part in self._factors:
            if part.scale is not None and not part.factor.is_cpu:
                part.scale = part.scale.float()  # kernels read float32; a product on the CPU reads its input's dtype
        self._together.stack()

    def _apply(self, fn: Any, recurse: bool = True) -> SharedCorrection:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._stack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slot": [None], "_traced": [None]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._stack()

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.group.name}, rank={self.rank}{'' if self.bits is None else f', {dtype_name(self.bits)}'}"


def _state(x: Tensor, gradients: bool) -> tuple[Any, ...]:
    """What must stay equal for a product of `x` to be reused; empty for inference tensors, which have no version."""
    if x.is_inference():
        return ()
    autocast = not x.is_meta and torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)
    return x._version, x.requires_grad, gradients, autocast
