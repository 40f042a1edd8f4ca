"""Read a LoRA adapter of EoRA, QERA, LoftQ or `glowq export --to peft` as a correction.

Modules that read the same input and hold equal lora_A become one group with a shared right factor again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..._version import __version__
from ...artifact.build import correction_of, stored_config
from ...artifact.correction import Correction
from ...artifact.coverage import coverage_of
from ...artifact.fingerprint import fingerprint, same_weights
from ...artifact.provenance import Provenance
from ...errors import ConfigError, CorrectionError, FingerprintError, NonFiniteError, UnsupportedModuleError
from ...factors.factors import GroupFactors
from ...factors.group import Group, group_name
from ...factors.units import GainUnit
from ...models.forward import example_inputs
from ...models.tracing import Trace, trace_groups
from ...quantizers.loading.dense import adopt_dense
from ...quantizers.model import check_scales, packed_bytes, prepare_model, refuse_misloaded
from ...runtime.attach import attached, factor_dtype
from .adapter_files import Adapter, read_adapter

__all__ = ["import_adapter"]


def import_adapter(
    adapter: str | os.PathLike[str],
    model: nn.Module,
    *,
    tokenizer: Any = None,
    dense: bool = False,
    **hub_kwargs: Any,
) -> Correction:
    """Read a LoRA adapter as a correction of `model`, without attaching it.

    Args:
        adapter: folder or Hub name, with adapter_config.json and adapter_model.safetensors.
        model: the quantized transformers model that the adapter was made for. LoftQ changes the base as well, so for
            its adapters this is the model that LoftQ saved.
        tokenizer: the tokenizer to save with the correction, or None.
        dense: whether the base of the adapter has plain float weights, see `glowq.correct`.
        **hub_kwargs: passed on to `huggingface_hub.snapshot_download`, e.g. `revision`, `token`.

    Returns:
        The correction. Its right factors are lora_A, and its left factors are lora_B times alpha / r (rsLoRA:
        alpha / sqrt(r)), in the model's dtype. Ranks and modules of zeros, such as padding, are left out. The gains
        are not measured and are zero: the correction can be saved and loaded, but it cannot be cut to a budget.

    Raises:
        ModelNotFoundError: no such adapter.
        PickleRefusedError: the adapter's weights are a pickle (adapter_model.bin).
        ConfigError: the adapter is not a LoRA adapter, does more than add lora_B lora_A to weights (the message names
            what), or adds nothing at all; or `model` carries a correction already.
        CorrectionError: the adapter's files are corrupt, or do not fit the model's modules.
        FingerprintError: `glowq export` wrote the adapter for other quantized weights.
        NonFiniteError: a factor holds NaN or Inf, or is too large for the model's dtype.
        UnsupportedModuleError: the adapter has factors of a module that is not quantized or cannot be corrected.
    """
    if attached(model):
        raise ConfigError("the model carries a correction already; call glowq.detach(model) first.")
    read = read_adapter(adapter, **hub_kwargs)
    refuse_misloaded(model)
    if dense:
        adopt_dense(model)
    if not prepare_model(model):
        raise UnsupportedModuleError(
            f"{type(model).__name__} holds no quantized linear module for the adapter to correct. Load it quantized "
            "(--base nf4, for example); if its float weights hold quantized values, pass dense=True (--base dense)."
        )
    check_scales(model)
    if read.fingerprint is not None and not same_weights(model, read.fingerprint):
        raise FingerprintError(
            f"the adapter {read.name} was exported for quantized weights {read.fingerprint}, but this model's are "
            f"{fingerprint(model)}: another model, another revision, or other quantization settings. Load the base "
            "that the adapter was exported for."
        )
    pairs = _on_modules(read, model)
    trace = trace_groups(model, example_inputs(model))
    _check_modules(read, pairs, model, trace)
    dtype = factor_dtype(model)
    parts = (_factors(group, pairs, dtype) for group in _groups(trace, pairs))
    factors = [entry for entry in parts if entry is not None]
    if not factors:
        raise ConfigError(
            f"the adapter {read.name} adds nothing: every lora_B or lora_A is zero. Was it ever trained or computed?"
        )
    base_bytes = packed_bytes(model)
    config = stored_config(model, None, base_bytes, "imported", torch.empty(0, 0), 0)
    config.provenance = Provenance(
        glowq=__version__,
        gains=GainUnit.UNMEASURED,
        adapter_base=read.base_model,
        coverage=coverage_of(model, trace),
    )
    return correction_of(model, factors, config, base_bytes, tokenizer)


_Pairs = Mapping[str, tuple[Tensor, Tensor]]  # module name -> right factor (r, d) and scaled left factor (o, r)


def _on_modules(read: Adapter, model: nn.Module) -> _Pairs:
    """The adapter's factors by the model's own module names; GPTQModel writes names in lower case.

    Raises:
        CorrectionError: the model has no such module.
    """
    names = {name for name, _ in model.named_modules()}
    lowered: dict[str, list[str]] = {}
    for name in names:
        lowered.setdefault(name.lower(), []).append(name)
    pairs = {}
    for name, pair in read.pairs.items():
        alike = [name] if name in names else lowered.get(name, [])
        if len(alike) != 1:
            raise CorrectionError(
                f"the adapter {read.name} holds factors of {name!r}, and {type(model).__name__} has no such module: it "
                "was made for another model."
            )
        pairs[alike[0]] = pair
    return pairs


def _check_modules(read: Adapter, pairs: _Pairs, model: nn.Module, trace: Trace) -> None:
    """Refuse factors of modules that cannot be corrected, and factors of another shape than the module."""
    shapes = {name: shape for group in trace.groups for name, shape in group.shapes.items()}
    for name, (right, left) in pairs.items():
        if name not in shapes:
            reason = trace.skipped.get(name, "it is not quantized")
            raise UnsupportedModuleError(
                f"the adapter {read.name} holds factors of {name}, which glowq cannot correct: {reason}."
            )
        found = (left.shape[0], right.shape[1])
        if found != shapes[name]:
            raise CorrectionError(
                f"the adapter's factors of {name} are of a layer of shape {found}, and the model's has {shapes[name]}: "
                "it was made for another model."
            )


def _groups(trace: Trace, pairs: _Pairs) -> Iterator[Group]:
    """The groups of the adapter: modules that read the same input and hold equal lora_A."""
    for group in trace.groups:
        alike: list[list[str]] = []
        for member in (member for member in group.members if member in pairs):
            twins = next((names for names in alike if torch.equal(pairs[names[0]][0], pairs[member][0])), None)
            if twins is None:
                alike.append([member])
            else:
                twins.append(member)
        yield from (_part(group, members) for members in alike)


def _part(group: Group, members: Sequence[str]) -> Group:
    if len(members) == len(group.members):
        return group
    widths = tuple(group.shapes[member][0] for member in members)
    return replace(group, name=group_name(members), members=tuple(members), out_features=widths)


def _factors(group: Group, pairs: _Pairs, dtype: torch.dtype) -> GroupFactors | None:
    """The group's factors in `dtype`, without ranks of zeros; None if no rank is left."""
    right = pairs[group.members[0]][0].to(dtype)
    lefts = {member: pairs[member][1].to(dtype) for member in group.members}
    for name, factor in {
        f"lora_A of {group.members[0]}": right,
        **{f"lora_B of {m}": left for m, left in lefts.items()},
    }.items():
        if not bool(torch.isfinite(factor).all()):
            raise NonFiniteError(f"{name} is NaN, infinite, or too large for {dtype}, the dtype of the model.")
    kept = right.any(1) & torch.stack([left.any(0) for left in lefts.values()]).any(0)
    if not bool(kept.any()):
        return None
    rank = int(kept.sum())
    lefts = {member: left[:, kept].contiguous() for member, left in lefts.items()}
    return GroupFactors(group, right[kept].contiguous(), lefts, torch.zeros(rank, dtype=torch.float64), 0.0)
