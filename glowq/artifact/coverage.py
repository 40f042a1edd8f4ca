"""Which part of a model's weights a correction covers, in bytes: corrected, only quantized, or not quantized at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .provenance import Coverage

if TYPE_CHECKING:
    from torch import nn

    from ..factors.group import Group
    from ..models.tracing import Trace

__all__ = ["coverage_of", "covered", "in_words"]

_LEAST = 0.01  # share of the bytes; parts below it are not named


def coverage_of(model: nn.Module, trace: Trace) -> Coverage:
    """Count the bytes of a model's weights by what can be done with them.

    Args:
        model: a quantized model.
        trace: its groups, and the modules that cannot be corrected.

    Returns:
        "modules" (module name -> bytes of its quantized weight at its nominal width, with scales, for all that can be
        corrected), "skipped" (reason -> bytes of the quantized modules that cannot be corrected for it) and
        "not_quantized" (class of a module -> bytes of the weights that it holds in float: embeddings, norms, fused
        experts).
    """
    from ..quantizers.experts import ExpertLinear
    from ..quantizers.model import quantized_modules

    quantized = quantized_modules(model)
    sizes = {name: backend.packed_bytes(model.get_submodule(name)) for name, backend in quantized.items()}
    inside = {id(part) for name in quantized for part in model.get_submodule(name).modules()}
    skipped: Counter[str] = Counter()
    for name, reason in trace.skipped.items():
        skipped[reason] += sizes.get(name, 0)
    floats: Counter[str] = Counter()
    # Tied weights count once. The weights of all experts of a layer are parts of one parameter.
    seen = {id(part.stack) for part in map(model.get_submodule, quantized) if isinstance(part, ExpertLinear)}
    for module in model.modules():
        for weight in module.parameters(recurse=False) if id(module) not in inside else ():
            if id(weight) not in seen:
                seen.add(id(weight))
                floats[type(module).__name__] += weight.nbytes
    return {
        "modules": {member: sizes.get(member, 0) for group in trace.groups for member in group.members},
        "skipped": dict(skipped),
        "not_quantized": dict(floats),
    }


def covered(coverage: Coverage | None, groups: Iterable[Group]) -> dict[str, Any] | None:
    """What a correction of some groups covers.

    Args:
        coverage: what `coverage_of` returned; None if it is not known.
        groups: the groups that the correction has.

    Returns:
        Shares of the bytes of all weights, which sum to 1: "corrected", "not_restored" (quantized, in groups that got
        no rank), "skipped" and "not_quantized"; and "text", the same in words, a part each, with the reasons of
        "skipped" and the classes of "not_quantized".
    """
    if not coverage:
        return None
    restored = {member for group in groups for member in group.members}
    modules, skipped = coverage.get("modules", {}), coverage.get("skipped", {})
    floats = coverage.get("not_quantized", {})
    sizes = {
        "corrected": sum(size for name, size in modules.items() if name in restored),
        "not_restored": sum(size for name, size in modules.items() if name not in restored),
        "skipped": sum(skipped.values()),
        "not_quantized": sum(floats.values()),
    }
    whole = sum(sizes.values())
    words = {
        "corrected": "corrected",
        "not_restored": "quantized, in groups that got no rank",
        "skipped": f"quantized, cannot be corrected ({_largest(skipped, whole)})",
        "not_quantized": f"not quantized ({_largest(floats, whole)})",
    }
    return in_words(sizes, words)


def in_words(sizes: Mapping[str, int], words: Mapping[str, str]) -> dict[str, Any] | None:
    """Shares of bytes, and "text", the same in words, without empty parts after the first; None if all are empty.

    Args:
        sizes: name of a part -> bytes.
        words: the same names -> what is said of the part.
    """
    whole = sum(sizes.values())
    if not whole:
        return None
    shares = {name: sizes[name] / whole for name in words}
    named = [name for number, name in enumerate(words) if number == 0 or sizes[name]]
    return {**shares, "text": [f"{shares[name]:.1%} {words[name]}" for name in named]}


def _largest(sizes: Mapping[str, int], whole: int) -> str:
    """Names of the parts, the largest first, without those that hold little of the whole; at least one."""
    ordered = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    named = [name for name, size in ordered if size >= _LEAST * whole]
    return ", ".join(named or [name for name, _ in ordered[:1]])
