"""One group's factors as a module, and what its members share of a forward."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..factors.group import Group
from ..factors.int8 import LEFT_UNIT
from . import operators

__all__ = ["SharedCorrection"]


class _Factor(nn.Module):
    """One factor as a leaf module: calling it (not reading its parameter) is what fires accelerate's offload hooks.

    `scale`, shape (rows,), is that of each row of an int8 factor, and None for any other.
    """

    factor: nn.Parameter
    scale: Tensor | None

    def __init__(self, factor: Tensor, scale: Tensor | None = None) -> None:
        super().__init__()
        self.factor = nn.Parameter(factor, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return operators.right(x, self.factor, self.scale)


class _Handle(Protocol):
    """What takes back a change of a member."""

    def remove(self) -> None: ...


class _Slot(NamedTuple):
    """What was computed from the input seen last, and who has used it. Replaced as a whole: threads are safe."""

    source: Any  # weakref of the input (eager) or the input itself (while tracing)
    state: tuple[Any, ...]
    product: Tensor | None  # the right product, where each member goes on by itself
    additions: tuple[Tensor, ...]  # else what each member adds
    used: int  # a bit a member


class SharedCorrection(nn.Module):
    """One group's factors and the slot that lets its members share what is computed from one input.

    Made of a group, its right factor B, shape (r, d), and each member's left factor A_i, shape (o_i, r), by name; of
    int8 where `scale`, shape (r,), is given, see `glowq.factors.int8`. `rank` says how many ranks are the
    correction's, where others are zeros.

    The slot serves a member only if the very same tensor object arrives, at the same version, under the same grad and
    autocast mode, and the member has not used it yet; the last member empties it, and so does a backward pass. Under
    `torch.inference_mode` tensors keep no version counter, so that an in-place write could not be seen: there every
    member computes its own product (`torch.no_grad`, which `generate` and pipelines use, shares).

    The members share the right product, and each writes its left product into its own output without a temporary. A
    few tokens on the CPU take as long as the calls for them do: there one call computes what all members add.
    """

    def __init__(
        self,
        group: Group,
        right: Tensor,
        lefts: Mapping[str, Tensor],
        scale: Tensor | None = None,
        *,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        self.rank = right.shape[0] if rank is None else rank
        self.enabled = True
        self.right = _Factor(right, scale)
        self.lefts = nn.ModuleList(
            _Factor(left, None if scale is None else scale.new_full((len(left),), LEFT_UNIT))
            for left in (lefts[member] for member in group.members)
        )
        # Found at once, which `self.lefts[index]` is not.
        self._factors: tuple[_Factor, ...] = (self.right, *self.lefts)
        self._widths = [len(lefts[member]) for member in group.members]
        self._whole: tuple[Any, ...] = ()  # where each left factor lies, all as one, and their scales
        self._slot: list[_Slot | None] = [None]  # a list: setting an attribute of a module is slow
        self._traced: list[_Slot | None] = [None]
        self._handles: list[_Handle] = []
        self._stack()

    @property
    def int8(self) -> bool:
        """Whether the factors are held in int8."""
        return self.right.scale is not None

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
            return (output + self._trace(index, x)).to(output.dtype)
        gradients = torch.is_grad_enabled()
        slot = self._found(index, x, gradients) or self._compute(index, x, gradients)
        if slot.product is None:
            addition = slot.additions[index]
        else:
            left: Any = self._factors[1 + index]
            if in_place and not gradients and not _is_watched(left):
                operators.left_add_(output, slot.product, left._parameters["factor"], left._buffers["scale"])
                return output
            addition = left(slot.product)
        if in_place and not (gradients and (output.requires_grad or addition.requires_grad)):
            return output.add_(addition)
        return (output + addition).to(output.dtype)

    @property
    def watched(self) -> bool:
        """Whether somebody's hook is on a factor, so that the factors have to be called as modules."""
        return any(map(_is_watched, self._factors))

    def right_product(self, index: int, x: Tensor) -> Tensor:
        """B x for member number `index`, computed once a forward like everything that the members share.

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
        """Copy the factors that lie in the memory of `others`, and no more: a change of dtype or device copies too."""
        taken = {other.untyped_storage().data_ptr() for other in others if not other.is_meta}
        shared = [part for part in self._factors if part.factor.untyped_storage().data_ptr() in taken]
        for part in shared:
            part.factor.data = part.factor.data.clone()
        if shared:
            self._stack()

    def _found(self, index: int, x: Tensor, gradients: bool) -> _Slot | None:
        """What another member has computed of this input, if it serves this one."""
        slot = self._slot[0]
        if slot is None or slot.source() is not x or slot.used & (1 << index) or slot.state != _state(x, gradients):
            return None
        self._slot[0] = self._used(slot, index)
        return slot

    def _compute(self, index: int, x: Tensor, gradients: bool, at_once: bool = True) -> _Slot:
        """What the members need of this input, kept for the others; see `_Slot`."""
        countless, right = x.is_inference(), self._factors[0]
        factor: Any
        factor, scale = right._parameters["factor"], right._buffers["scale"]
        watched = self.watched
        if not watched:
            self._check_device(x, factor)
        few = x.is_cpu and x.numel() <= operators.FEW * x.shape[-1]
        if few and at_once and not (watched or gradients or countless):
            whole, left_scale = self._together()
            total = operators.correction(x, factor, whole, scale, left_scale)
            parts = torch.split_with_sizes(total, self._widths, -1) if len(self._widths) > 1 else (total,)
            product, additions = None, tuple(parts)
        else:
            product, additions = right(x), ()
            if product.requires_grad:
                product.register_hook(self._forget)  # backward frees the graph that a later member would share
        if len(self._widths) == 1 or countless:
            return _Slot(None, (), product, additions, 0)
        slot = _Slot(weakref.ref(x), _state(x, gradients), product, additions, 1 << index)
        self._slot[0] = slot
        return slot

    def _trace(self, index: int, x: Tensor) -> Tensor:
        # Dynamo follows neither weak references nor versions, and inductor does not merge repeated products; one
        # traced forward leaves the slot as it found it (empty), so that no guard fails on the next call. A write into
        # the input between two members goes unseen here, but `find_groups` never groups such members. On the CPU each
        # member has its own left product, which a compiler makes part of the addition, and an exporter understands.
        apart = x.device.type == "cpu" or torch.compiler.is_exporting() or self.watched
        slot = self._traced[0]
        if slot is not None and slot.source is x and not slot.used & (1 << index):
            self._traced[0] = self._used(slot, index)
        else:
            if apart:
                slot = _Slot(x, (), self.right(x), (), 1 << index)
            else:
                whole, left_scale = self._together()
                total = operators.correction(x, self.right.factor, whole, self.right.scale, left_scale)
                slot = _Slot(x, (), None, total.split(self._widths, -1), 1 << index)
            if len(self._widths) > 1:
                self._traced[0] = slot
        if slot.product is None:
            return slot.additions[index]
        addition: Tensor = self._factors[1 + index](slot.product)
        return addition

    def _used(self, slot: _Slot, index: int) -> _Slot | None:
        """The slot once one more member has used it: nothing, after the last."""
        used = slot.used | (1 << index)
        if used == (1 << len(self._widths)) - 1:
            return None
        return _Slot(slot.source, slot.state, slot.product, slot.additions, used)

    def _together(self) -> tuple[Tensor, Tensor | None]:
        """All left factors as one, shape (O, r), with the scale of every row; put together again if one has moved."""
        if torch.compiler.is_compiling():
            return torch.cat([left.factor for left in self._factors[1:]]), self._left_scale()
        places, whole, scale = self._whole
        if places != _places(self._factors):
            self._stack()
            places, whole, scale = self._whole
        return whole, scale

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
        factors = [left.factor for left in self._factors[1:]]
        whole = operators.joined(factors)
        if whole is None:
            pieces = operators.stacked([factor.data for factor in factors])
            for factor, piece in zip(factors, pieces, strict=True):
                factor.data = piece
            whole = operators.joined(factors)
        for part in self._factors:
            if part.scale is not None and not part.factor.is_cpu:
                part.scale = part.scale.float()  # what kernels read; a product on the CPU wants its input's dtype
        self._whole = _places(self._factors), whole, self._left_scale()

    def _left_scale(self) -> Tensor | None:
        """The scale of every row of all left factors."""
        scales = [left.scale for left in self._factors[1:] if left.scale is not None]
        return torch.cat(scales) if scales else None

    def _apply(self, fn: Any, recurse: bool = True) -> SharedCorrection:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._stack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slot": [None], "_traced": [None], "_whole": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._stack()

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.group.name}, rank={self.rank}{', int8' if self.int8 else ''}"


def _state(x: Tensor, gradients: bool) -> tuple[Any, ...]:
    """What must be as it was for a product of `x` to be used again; tensors of inference mode have no version."""
    if x.is_inference():
        return ()
    autocast = not x.is_meta and torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)
    return x._version, x.requires_grad, gradients, autocast


def _is_watched(factor: Any) -> bool:
    """Whether a factor has to be called as a module, because somebody's hook is on it."""
    state = factor.__dict__
    return bool(state["_forward_hooks"] or state["_forward_pre_hooks"] or "_hf_hook" in state)


def _places(factors: tuple[Any, ...]) -> list[int]:
    """Where the left factors of a container lie in memory."""
    return [factor._parameters["factor"].data_ptr() for factor in factors[1:]]
