"""Find the groups of modules that read the same tensor, by tracing one forward.

Two modules are in the same group if they are in the same decoder block, and all their calls received, in the same
order, the same tensor at the same version (the number of in-place writes), or views of the same part of it. Names and
values are not compared: different inputs can hold equal values, and a name does not show what a module reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import NonFiniteError, UnsupportedModuleError
from ..factors.group import Group, group_name
from ..quantizers.model import prepare_model, quantized_modules
from ..quantizers.registry import find_backend
from ..utils.places import place
from ..utils.timeline import stage
from .blocks import block_index
from .forward import evaluating
from .wrappers import uncompiled, underlying

__all__ = ["UNREACHED", "Trace", "find_groups", "trace_groups"]

UNREACHED = (
    "never called in the traced forward (its weight may be read directly): a hook would do nothing",
    "no token of the traced text reaches it",
)
"""Why a candidate is left out that a forward does not call, or calls with no token; longer text may reach an expert."""

_TOLERANCE = 0.05  # relative; rounding inputs to 8 bits makes a difference of 0.01


@dataclass(frozen=True)
class Trace:
    """The result of tracing one forward.

    Attributes:
        groups: groups in call order.
        skipped: each candidate that was left out -> the reason.
        in_order: whether the block of every group ran once. It runs more often where layers share their weights, as in
            ALBERT; and never where the model calls the parts of a block one by one.
    """

    groups: list[Group]
    skipped: dict[str, str] = field(default_factory=dict)
    in_order: bool = True


def find_groups(model: nn.Module, example_inputs: Mapping[str, Any]) -> list[Group]:
    """Find the groups of linear modules that read the same tensor, by running `model` once.

    Quantized modules are prepared first, so that their weights can still be read afterwards.

    Args:
        model: any model, also a compiled one. Its quantized modules are the candidates, or its linear layers if no
            module is quantized.
        example_inputs: keyword arguments of one forward, e.g. {"input_ids": (1, n) int64}.

    Returns:
        Groups in the order in which the forward called them. A module that shares its input with no other module forms
        a group of its own. Modules that cannot be corrected are left out (see `trace_groups` for the reasons).

    Raises:
        UnsupportedModuleError: the model has no linear module at all, a part of it is compiled on its own, or the input
            of a linear module is not of a float dtype.
        NonFiniteError: the input of a linear module holds NaN or Inf.
    """
    return trace_groups(model, example_inputs).groups


@stage("tracing")
def trace_groups(model: nn.Module, example_inputs: Mapping[str, Any]) -> Trace:
    """Like `find_groups`, with the reasons why candidates were left out."""
    model = underlying(model)
    prepare_model(model)  # bitsandbytes can repack weights in a forward: they could not be read after this one
    candidates = _candidates(model)
    block_of = block_index(model, candidates)
    calls, runs, wrong = _record_calls(model, candidates, set(block_of.values()), example_inputs)
    skipped: dict[str, str] = {}
    gathered: dict[tuple[Any, ...], list[str]] = {}
    for name in sorted(calls, key=lambda name: calls[name][0].order if calls[name] else -1):
        reason = wrong.get(name) or _refusal(candidates[name], calls[name])
        if reason is not None:
            skipped[name] = reason
            continue
        inputs = tuple((call.tensor, call.version) for call in calls[name])
        gathered.setdefault((block_of[name], inputs), []).append(name)
    groups = [
        Group(
            name=group_name(members),
            members=tuple(members),
            in_features=candidates[members[0]][1],
            out_features=tuple(candidates[member][0] for member in members),
            block=block,
        )
        for (block, _), members in gathered.items()
    ]
    return Trace(groups, skipped, all(runs[group.block] == 1 for group in groups))


@dataclass(frozen=True)
class _Call:
    order: int
    tensor: int | None  # number of the input tensor; None if there was none
    version: int
    width: int
    is_filled: bool  # it has a token, or no tensor to tell


class _Numbered:
    """Numbers for tensors, the same for views of the same values.

    Tensors are held until `release`, so that no other one gets the same id meanwhile.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, Hashable], tuple[Tensor, int]] = {}
        self._next = count()

    def number(self, tensor: Tensor) -> int:
        root, layout = place(tensor)
        key = (id(root), layout)
        if key not in self._held:
            self._held[key] = (root, next(self._next))
        return self._held[key][1]

    def release(self) -> None:
        self._held.clear()


def _candidates(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Module name -> (out_features, in_features) of every module that could be corrected."""
    quantized = quantized_modules(model)
    if quantized:
        return {name: backend.features(model.get_submodule(name)) for name, backend in quantized.items()}
    dense = {
        name: (int(module.out_features), int(module.in_features))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and find_backend(module) is None
    }
    if not dense:
        raise UnsupportedModuleError(f"{type(model).__name__} has no linear module: there is nothing to group.")
    return dense


def _record_calls(
    model: nn.Module,
    candidates: Mapping[str, tuple[int, int]],
    stops: Iterable[str],
    example_inputs: Mapping[str, Any],
) -> tuple[dict[str, list[_Call]], Counter[str], dict[str, str]]:
    """Run the model.

    Returns:
        The calls of every candidate; how often each module of `stops` ran; and of each candidate that computes
        something else than W x + b, what is wrong.
    """
    calls: dict[str, list[_Call]] = {name: [] for name in candidates}
    wrong: dict[str, str] = {}
    runs: Counter[str] = Counter()
    clock, numbered = count(), _Numbered()

    def counter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            runs[name] += 1
            numbered.release()  # only modules of one block are grouped

        return hook

    def recorder(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            tensor = args[0] if args and isinstance(args[0], Tensor) else None
            if tensor is not None and not tensor.is_floating_point():
                raise UnsupportedModuleError(
                    f"{name}: the model turns its input into {tensor.dtype}, the dtype of the quantized weight, so "
                    "that its output is wrong also without a correction. Quantize the model without this module "
                    "(llm_int8_skip_modules, modules_to_not_convert)."
                )
            if tensor is not None and _is_broken(tensor):
                raise NonFiniteError(
                    f"{name}: its input holds NaN or Inf. The model itself is broken: check that it generates, or load "
                    "it in another dtype."
                )
            # A tensor made in inference mode has no version; outside of that mode PyTorch forbids writing into it.
            version = -1 if tensor is None or tensor.is_inference() else tensor._version
            number = None if tensor is None else numbered.number(tensor)
            width, is_filled = (0, True) if tensor is None else (tensor.shape[-1], tensor.numel() > 0)
            calls[name].append(_Call(next(clock), number, version, width, is_filled))

        return hook

    def checker(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if name not in wrong and args and isinstance(args[0], Tensor):
                reason = _not_linear(module, candidates[name][0], args[0], output)
                if reason is not None:
                    wrong[name] = reason

        return hook

    with ExitStack() as stack, torch.inference_mode(False), torch.no_grad(), evaluating(model), uncompiled():
        for name in calls:
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(recorder(name)).remove)
            stack.callback(module.register_forward_hook(checker(name)).remove)
        for name in stops:
            stack.callback(model.get_submodule(name).register_forward_hook(counter(name)).remove)
        model(**example_inputs)
    return calls, runs, wrong


def _is_broken(tensor: Tensor) -> bool:
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta or bool(torch.isfinite(tensor).all()))


def _not_linear(module: nn.Module, width: int, x: Tensor, output: Any) -> str | None:
    """What is wrong with an output that is not W x + b; None if nothing is.

    The values are compared only where a layer may compute others, and where there are values.
    """
    if not isinstance(output, Tensor):
        return f"its output is a {type(output).__name__}, not W x + b"
    if output.shape[-1] != width:
        return f"its output is {output.shape[-1]} wide, and its weight has {width} rows"
    backend = find_backend(module)
    if backend is None or not backend.may_differ(module) or isinstance(output, FakeTensor) or output.is_meta:
        return None
    weight, bias = backend.weight(module).to(x.device).float(), getattr(module, "bias", None)
    expected = F.linear(x.float(), weight, None if bias is None else bias.float())
    error = float((output.float() - expected).norm() / expected.norm().clamp_min(1e-30))
    return None if error < _TOLERANCE else f"its output differs from W x + b by {error:.0%}"


def _refusal(features: tuple[int, int], calls: list[_Call]) -> str | None:
    if not calls:
        return UNREACHED[0]
    if not any(call.is_filled for call in calls):
        return UNREACHED[1]
    if any(call.tensor is None for call in calls):
        return "called without a positional input tensor"
    if any(call.width != features[1] for call in calls):
        return f"its input is not {features[1]} wide"
    return None
