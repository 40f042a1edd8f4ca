"""Attach a correction to a model: one right product per group and forward, one left product per member.

Each group gets one container module beside its members, and each member gets a forward hook. The members keep their
names, parameters and classes, so that PEFT, accelerate, deepcopy and checkpoints work as they do without a correction.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

import torch
from torch import nn

from ..errors import ConfigError
from ..factors.factors import GroupFactors
from ..factors.group import Group
from ..factors.integers import Packed, Stored, in_bytes, pack, unpack
from ..quantizers.experts import tensor_holder
from ..utils.checks import check_module
from .container import SharedCorrection
from .hook import MemberHook
from .products import INT8_MULTIPLE

__all__ = ["applied", "attach", "attached", "attached_factors", "detach", "factor_dtype", "hold_as_floats", "set_aside"]

CONTAINER = "glowq_"


def attach(model: nn.Module, factors: GroupFactors, *, dtype: torch.dtype | None = None) -> SharedCorrection:
    """Add the correction of one group to `model`. The factors are copied: training the model does not change `factors`.

    On a CPU, factors of 4 or 3 bits are held in int8, because torch has no fast product with fewer bits.

    From now on, torch.compile's graphs in this process check hooks. Graphs that were compiled earlier are discarded
    once.

    Args:
        model: the model, which holds every member of the group under its name.
        factors: the group and its factors.
        dtype: dtype of the attached factors; None keeps their own. For rounded factors it is the dtype of their scales.

    Raises:
        ConfigError: the group carries a correction already.
    """
    group = factors.group
    path = _holder(model, group)
    parent, name = model.get_submodule(path), _container_name(group, path)
    if hasattr(parent, name):
        raise ConfigError(f"group {group.name!r} carries a correction already; call glowq.detach(model) first.")
    device = torch.device(_execution_device(model.get_submodule(group.members[0])))
    if factors.bits is not None:
        packed = pack(factors.right, factors.lefts, factors.bits)
        if device.type == "cpu":
            packed = in_bytes(packed, group.shapes, INT8_MULTIPLE)
        scale = packed.scale.to(factors.right.dtype)
        container = SharedCorrection(group, packed.right, packed.lefts, scale, rank=factors.rank, bits=factors.bits)
    else:
        lefts = {member: Stored(left) for member, left in factors.lefts.items()}
        container = SharedCorrection(group, Stored(factors.right), lefts)
    _make_graphs_check_hooks()
    container.to(device=device, dtype=dtype)
    container.unshare((factors.right, *factors.lefts.values()))
    container.train(parent.training)
    parent.add_module(name, container)
    for index, member in enumerate(group.members):
        hook = MemberHook(container, index)
        handle = model.get_submodule(member).register_forward_hook(hook, with_kwargs=True)
        container._handles.append(handle)
    return container


def _make_graphs_check_hooks() -> None:
    """Make torch.compile check a module's hooks before it runs a graph.

    A correction consists of hooks. Without the check, a graph would run unchanged after a correction is attached or
    detached, and it would also run for other models of the same class, with or without a correction.
    """
    may_have_compiled = "torch._dynamo" in sys.modules
    import torch._dynamo.config as compiler

    if compiler.skip_nnmodule_hook_guards:
        compiler.skip_nnmodule_hook_guards = False
        if may_have_compiled:
            torch.compiler.reset()


def attached(model: nn.Module) -> dict[str, SharedCorrection]:
    """Group name -> container of every correction attached to `model`, in module order.

    A model's own code may have replaced the module that holds a container, as BigBird's does for short inputs. Its
    members have kept their hooks.
    """
    modules = list(check_module(model).modules())
    found = {module.group.name: module for module in modules if isinstance(module, SharedCorrection)}
    for hook in (hook for module in modules for hook in module._forward_hooks.values()):
        if isinstance(hook, MemberHook):
            found.setdefault(hook.container.group.name, hook.container)
    return found


def detach(model: nn.Module) -> None:
    """Remove every correction: afterwards `model` computes what it computed before, bit for bit."""
    for container in attached(model).values():
        for handle in container._handles:
            handle.remove()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SharedCorrection):
                delattr(parent, name)


def attached_factors(model: nn.Module) -> list[GroupFactors]:
    """The factors of every correction attached to `model`, in module order.

    Their gains and totals are zero, because containers do not keep them.
    """
    return [_factors_of(container, factor_dtype(model)) for container in attached(model).values()]


def _factors_of(container: SharedCorrection, dtype: torch.dtype) -> GroupFactors:
    group, rank = container.group, container.rank
    first, *others = container._factors
    right, lefts = first.stored(), {member: left.stored() for member, left in zip(group.members, others, strict=True)}
    if first.scale is None:
        floats = right.values, {member: left.values for member, left in lefts.items()}
    else:
        if right.multipliers is None:  # without the ranks of zeros
            right = Stored(right.values[:rank])
            lefts = {member: Stored(left.values[:, :rank].contiguous()) for member, left in lefts.items()}
        floats = unpack(Packed(right, first.scale[:rank], lefts), dtype, group.shapes)
    return GroupFactors(group, *floats, torch.zeros(rank, dtype=torch.float64), 0.0, container.bits)


def hold_as_floats(model: nn.Module) -> None:
    """Replace attached factors of whole numbers by floats of the same values, for programs that support only floats."""
    before = attached(model)
    if not any(container.bits for container in before.values()):
        return
    factors = attached_factors(model)
    detach(model)
    for entry in factors:
        old = before[entry.group.name]
        attach(model, replace(entry, bits=None)).switch(old.switched_on, old.pauses)


@contextmanager
def applied(model: nn.Module, factors: Sequence[GroupFactors]) -> Iterator[nn.Module]:
    """Inside this context these factors are attached to `model`; afterwards none are."""
    try:
        for entry in factors:
            attach(model, entry)
        yield model
    finally:
        detach(model)


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Inside this context the module tree holds no containers, because some bases store a list of all tensors in it."""
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
    """The dtype of a model's factors: its own dtype, or bfloat16 if that is not a float of 16 bits or more."""
    dtype = getattr(model, "dtype", torch.float32)
    return dtype if dtype.is_floating_point and dtype.itemsize >= 2 else torch.bfloat16


def _holder(model: nn.Module, group: Group) -> str:
    """Name of the innermost module that holds every member. It is no Sequential, which calls whatever it holds."""
    path = group.parent
    while path and isinstance(model.get_submodule(path), nn.Sequential | nn.ModuleList | nn.ModuleDict):
        path = path.rpartition(".")[0]
    return path


def _container_name(group: Group, path: str) -> str:
    local = group.members[0].removeprefix(f"{path}.") if path else group.members[0]
    return CONTAINER + local.replace(".", "_")


def _execution_device(module: nn.Module) -> torch.device | str:
    """The device that accelerate runs the module on if it is offloaded, otherwise the device of its weight."""
    device = getattr(getattr(tensor_holder(module), "_hf_hook", None), "execution_device", None)
    if device is not None:
        if not isinstance(device, int):
            return device
        # A plain number is the index of a device of the current accelerator.
        accelerator = torch.accelerator.current_accelerator()
        return torch.device("cuda" if accelerator is None else accelerator.type, device)
    tensors = chain(tensor_holder(module).parameters(), module.buffers())  # GPTQ keeps its weight in buffers
    return next(tensors).device
