"""Attach a correction to a model: the right factor once per forward, one left factor a member.

Each group gets one container, a sibling of its members, and each member a forward hook. The members themselves are
untouched: their names, parameters and classes stay, so that PEFT, accelerate, deepcopy and checkpoints see the model
that they know.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import ConfigError
from .groups import Group

__all__ = [
    "GroupFactors",
    "SharedCorrection",
    "attach",
    "attached",
    "attached_factors",
    "detach",
    "factor_dtype",
    "set_aside",
]

CONTAINER = "glowq_"


@dataclass(frozen=True)
class GroupFactors:
    """One group and its factors.

    Attributes:
        group: the group.
        right: right factor B, shape (r, d).
        lefts: member name -> left factor A_i, shape (o_i, r).
        gains: error that each rank removes, shape (r,), float64, descending, in one unit for the whole correction.
        total: error before any rank, in the same unit.
    """

    group: Group
    right: Tensor
    lefts: Mapping[str, Tensor]
    gains: Tensor
    total: float

    @property
    def rank(self) -> int:
        """Rank r of the group."""
        return self.right.shape[0]

    @property
    def factor_bytes(self) -> int:
        """Bytes of the right factor and every left factor."""
        return sum(t.numel() * t.element_size() for t in (self.right, *self.lefts.values()))


class _Factor(nn.Module):
    """One factor as a leaf module: calling it (not reading its parameter) is what fires accelerate's offload hooks."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(factor, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x if x.dtype == self.factor.dtype else x.to(self.factor.dtype), self.factor)


@dataclass(frozen=True, eq=False)
class _Slot:
    """The right product of the input seen last, and who has used it. Replaced as a whole, so that threads are safe."""

    source: Any  # weakref of the input (eager) or the input itself (while tracing)
    state: tuple[Any, ...]
    product: Tensor
    used: frozenset[int]


class SharedCorrection(nn.Module):
    """One group's factors and the slot that lets its members share the right product of one input.

    The slot serves a member only if the very same tensor object arrives, at the same version, under the same grad and
    autocast mode, and the member has not used it yet; the last member empties it, and so does a backward pass. Under
    `torch.inference_mode` tensors keep no version counter, so that an in-place write could not be seen: there every
    member computes its own product (`torch.no_grad`, which `generate` and pipelines use, shares).
    """

    def __init__(self, factors: GroupFactors) -> None:
        super().__init__()
        self.group = factors.group
        self.rank = factors.rank
        self.enabled = True
        self.right = _Factor(factors.right)
        self.lefts = nn.ModuleList(_Factor(factors.lefts[member]) for member in factors.group.members)
        self._slot: _Slot | None = None
        self._handles: list[RemovableHandle] = []

    def forward(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        """The corrected output of member number `index`.

        Args:
            index: position in `group.members`.
            x: the member's input, shape (..., d).
            output: the quantized module's output Q x, shape (..., o_i).

        Returns:
            Q x + A_i (B x), shape and dtype of `output`.
        """
        correction = self.lefts[index](self._product(index, x))
        return correction.to(output.dtype).add_(output)  # in place into the fresh product: the output may be anybody's

    def _product(self, index: int, x: Tensor) -> Tensor:
        if len(self.lefts) == 1:
            return self.right(x)
        if torch.compiler.is_compiling():
            return self._traced_product(index, x)
        if x.is_inference():
            return self.right(x)
        state = (x._version, x.requires_grad, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type))
        slot = self._slot
        # The state comes first: a slot that tracing left half used has none, and its source is no weak reference.
        if slot is not None and slot.state == state and slot.source() is x and index not in slot.used:
            used = slot.used | {index}
            self._slot = None if len(used) == len(self.lefts) else _Slot(slot.source, state, slot.product, used)
            return slot.product
        product = self.right(x)
        if product.requires_grad:
            product.register_hook(self._forget)  # backward frees the graph that a later member would share
        self._slot = _Slot(weakref.ref(x), state, product, frozenset((index,)))
        return product

    def _forget(self, gradient: Tensor) -> None:
        self._slot = None

    def _traced_product(self, index: int, x: Tensor) -> Tensor:
        # Dynamo follows neither weak references nor versions, and inductor does not merge repeated products; one
        # traced forward leaves the slot as it found it (empty), so that no guard fails on the next call. A write into
        # the input between two members goes unseen here, but `find_groups` never groups such members.
        slot = self._slot
        if slot is not None and slot.source is x and index not in slot.used:
            used = slot.used | {index}
            self._slot = None if len(used) == len(self.lefts) else _Slot(x, (), slot.product, used)
            return slot.product
        product = self.right(x)
        self._slot = _Slot(x, (), product, frozenset((index,)))
        return product

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slot": None}

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.group.name}, rank={self.rank}"


class _Hook:
    """A member's forward hook; an object rather than a closure, so that models stay picklable."""

    def __init__(self, container: SharedCorrection, index: int) -> None:
        self.container = container
        self.index = index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self.container.enabled:
            return output
        return self.container(self.index, args[0], output)


def attach(model: nn.Module, factors: GroupFactors, *, dtype: torch.dtype | None = None) -> SharedCorrection:
    """Add one group's correction to `model`.

    Args:
        model: holds every member under its name.
        factors: shapes as in `GroupFactors`.
        dtype: stored dtype of the factors; None keeps theirs.

    Raises:
        ConfigError: the group is attached already.
    """
    group = factors.group
    parent = model.get_submodule(group.parent)
    name = _container_name(group)
    if hasattr(parent, name):
        raise ConfigError(f"group {group.name!r} carries a correction already; call glowq.detach(model) first.")
    container = SharedCorrection(factors)
    container.to(device=_execution_device(model.get_submodule(group.members[0])), dtype=dtype)
    container.train(parent.training)
    parent.add_module(name, container)
    for index, member in enumerate(group.members):
        handle = model.get_submodule(member).register_forward_hook(_Hook(container, index))
        container._handles.append(handle)
    return container


def attached(model: nn.Module) -> dict[str, SharedCorrection]:
    """Group name -> container of every correction attached to `model`, in module order."""
    return {module.group.name: module for module in model.modules() if isinstance(module, SharedCorrection)}


def detach(model: nn.Module) -> None:
    """Remove every correction: afterwards `model` computes what it computed before, bit for bit."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SharedCorrection):
                for handle in child._handles:
                    handle.remove()
                delattr(parent, name)


def attached_factors(model: nn.Module) -> list[GroupFactors]:
    """The factors of every correction attached to `model`, in module order; gains and totals are not kept there."""
    return [
        GroupFactors(
            container.group,
            container.right.factor.detach(),
            {
                member: left.factor.detach()  # type: ignore[operator]
                for member, left in zip(container.group.members, container.lefts, strict=True)
            },
            torch.zeros(container.rank, dtype=torch.float64),
            0.0,
        )
        for container in attached(model).values()
    ]


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Inside this context the module tree is the base's: some bases store a list of every tensor of the model."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, SharedCorrection)
    ]
    try:
        for parent, name, _ in found:
            del parent._modules[name]
        yield
    finally:
        for parent, name, child in found:
            parent._modules[name] = child


def factor_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's factors, in memory and on disk: its own."""
    dtype = getattr(model, "dtype", torch.float32)
    return dtype if dtype.is_floating_point and dtype.itemsize >= 2 else torch.bfloat16


def _container_name(group: Group) -> str:
    local = group.members[0].removeprefix(f"{group.parent}.") if group.parent else group.members[0]
    return CONTAINER + local.replace(".", "_")


def _execution_device(module: nn.Module) -> torch.device | str:
    """Where accelerate runs the module if it is offloaded, else where its weight is."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device("cuda", device) if isinstance(device, int) else device
    return next(chain(module.parameters(), module.buffers())).device  # GPTQ keeps its weight in buffers
