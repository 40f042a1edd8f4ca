"""Export a correction as a PEFT LoRA adapter: in each module lora_A = right factor, lora_B = left factor, alpha = rank.

Every module of an adapter has a lora_A of its own. So the right factor that a group shares is stored once for each
member, and the right product is computed once for each member.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ...artifact.config import GlowQConfig
from ...artifact.saved import read_saved
from ...errors import ConfigError, ExportError, one_line
from ...models.forward import example_inputs
from ...quantizers.model import quantized_modules
from ...runtime.attach import attached_factors
from ..export.common import difference, first_output, load_corrected, refuse_experts, stored_correction
from .adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, KEY_PREFIX
from .base import find_base, load_base
from .card import adapter_card

__all__ = ["write"]

_ROUNDINGS = 8  # allowed relative difference of outputs, in units of the dtype's eps: orders of summation differ

_Pairs = dict[str, tuple[Tensor, Tensor]]  # module name -> lora_A (r, d) and lora_B (o, r)


def write(
    source: str,
    folder: Path,
    *,
    pad_ranks: bool = False,
    fill_modules: bool = False,
    max_rank: int | None = None,
    base_model: str | None = None,
) -> dict[str, Any]:
    """Write adapter_config.json, adapter_model.safetensors and a README.md with the code that loads the adapter.

    Args:
        source: folder or Hub name of a corrected model, in either saved form.
        folder: an empty folder to write to.
        pad_ranks: fill the factors of every module with zeros up to the largest rank, for engines that support only
            one rank (SGLang, vLLM).
        fill_modules: write factors of zeros for quantized modules without a correction, for engines that need factors
            for every module (GPTQModel).
        max_rank: largest rank that the engine supports; a larger rank is refused.
        base_model: folder or Hub name of the base, if it is not the one that the correction names.

    Returns:
        "base_model", "fingerprint" (of the base's quantized weights), "modules" (number of modules), "least_rank",
        "largest_rank", "adapter_bytes" (bytes of the adapter's factors), "shared_bytes" (bytes of the same factors in
        the correction), and "check" (differences of outputs, and "tolerance").

    Raises:
        ConfigError: PEFT is not installed.
        ExportError: the model carries no correction, a rank is above `max_rank`, the base is stored nowhere, PEFT
            cannot load the adapter, or its outputs differ from the corrected model's.
        FingerprintError: `base_model` is not the base of this correction.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("--to peft checks what it wrote with PEFT, which is not installed: pip install peft")
    config = stored_correction(source)
    _check_ranks(source, config, max_rank)
    base = find_base(source, config, base_model)
    model = load_corrected(source)
    refuse_experts(model, "PEFT adapts linear modules, and there is none for a single expert")
    factors, dtype = attached_factors(model), model.dtype
    inputs = example_inputs(model)
    expected = first_output(model, inputs)
    pairs: _Pairs = {}
    for entry in factors:
        pairs.update({member: (entry.right.cpu(), left.cpu()) for member, left in entry.lefts.items()})
    if fill_modules:
        pairs.update(_zeros(model, pairs))
    if pad_ranks:
        pairs = _padded(pairs)
    settings = _settings(model, pairs) | {"base_model_name_or_path": base.name, "revision": base.revision}
    (folder / "README.md").write_text(adapter_card(base, model))
    del model
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    tensors = {f"{KEY_PREFIX}{name}.lora_B.weight": b for name, (_, b) in pairs.items()}
    # Copied, because safetensors refuses tensors that share memory, as the members of a group share a right factor.
    tensors |= {f"{KEY_PREFIX}{name}.lora_A.weight": a.clone() for name, (a, _) in pairs.items()}
    (folder / ADAPTER_WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    ranks = sorted(a.shape[0] for a, _ in pairs.values())
    return {
        "base_model": base.name,
        "fingerprint": (config.base_model or {})["fingerprint"],  # `import_adapter` compares it with the model's
        "modules": len(pairs),
        "least_rank": ranks[0],
        "largest_rank": ranks[-1],
        "adapter_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "shared_bytes": sum(entry.factor_bytes for entry in factors),
        "check": _check(folder, load_base(base, config, dtype), pairs, inputs, expected),
    }


def _check_ranks(source: str, config: GlowQConfig, max_rank: int | None) -> None:
    ranks = {name: group["rank"] for name, group in (config.groups or {}).items()}
    if not ranks:
        raise ExportError(f"the correction of {source} restores no group: there is nothing to export.")
    largest = max(ranks, key=lambda name: ranks[name])
    if max_rank is None or ranks[largest] <= max_rank:
        return
    advice = f"Correct again with --rank {max_rank}, or with --budget and --max-rank {max_rank}."
    if config.format == "correction" and config.total:
        whole = read_saved(source).headers.factor_bytes
        advice = f"Cut it first: glowq select {source} --budget {whole} --max-rank {max_rank} --output SMALLER"
    raise ExportError(f"group {largest!r} has rank {ranks[largest]}, above --max-rank {max_rank}. {advice}")


def _zeros(model: Any, pairs: _Pairs) -> _Pairs:
    """Factors of rank 1, all zeros, for every quantized module that has no factors."""
    dtype = next(iter(pairs.values()))[0].dtype
    shapes = {
        name: backend.features(model.get_submodule(name))
        for name, backend in quantized_modules(model).items()
        if name not in pairs
    }
    return {name: (torch.zeros(1, d, dtype=dtype), torch.zeros(o, 1, dtype=dtype)) for name, (o, d) in shapes.items()}


def _padded(pairs: _Pairs) -> _Pairs:
    rank = max(a.shape[0] for a, _ in pairs.values())
    return {name: (_wider(a, rank, 0), _wider(b, rank, 1)) for name, (a, b) in pairs.items()}


def _wider(factor: Tensor, rank: int, dim: int) -> Tensor:
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def _settings(model: Any, pairs: _Pairs) -> dict[str, Any]:
    """The content of adapter_config.json, without the fields that name the base."""
    ranks = {name: a.shape[0] for name, (a, _) in sorted(pairs.items())}
    largest = max(ranks.values())
    patterns = {name: rank for name, rank in ranks.items() if rank != largest}
    generates = model.can_generate()
    kind = type(model)
    return {
        "peft_type": "LORA",
        "task_type": ("SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM") if generates else None,
        "auto_mapping": None if generates else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": list(ranks),  # full names, because PEFT matches a shorter name in other modules too
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
    }


def _check(folder: Path, base: Any, pairs: _Pairs, inputs: Mapping[str, Any], expected: Tensor) -> dict[str, Any]:
    """Load the adapter with PEFT: its factors must be equal bit for bit, and the outputs up to rounding.

    Raises:
        ExportError: PEFT cannot load the adapter, or its factors or the outputs differ.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    dtype = base.dtype
    try:
        model = PeftModel.from_pretrained(base, folder).eval()
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ExportError(f"PEFT cannot load this correction onto its base: {one_line(error)}") from error
    found = {
        name.removeprefix(KEY_PREFIX): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    odd = sorted(found.keys() ^ pairs.keys())
    if odd:
        raise ExportError(f"PEFT puts the adapter onto other modules than those with a correction: {odd[0]!r}.")
    for name, (a, b) in pairs.items():
        layer = found[name]
        read = [layer.lora_A["default"].weight.cpu(), layer.lora_B["default"].weight.cpu()]
        if layer.scaling["default"] != 1 or not _same(read, (a, b)):
            raise ExportError(f"PEFT reads other factors of {name!r} than were written.")
        for factor in (layer.lora_A, layer.lora_B):
            factor.to(a.dtype)  # PEFT computes in float32, the correction in the model's dtype
    figures = difference(first_output(model, dict(inputs)), expected)
    tolerance = _ROUNDINGS * torch.finfo(dtype).eps
    if not figures["relative_difference"] <= tolerance:
        raise ExportError(
            f"with PEFT the model computes other outputs than the corrected model: they differ by up to "
            f"{figures['max_difference']:.3g} ({figures['relative_difference']:.3g} of their size), and rounding "
            f"explains at most {tolerance:.3g}. Please report it, with the name of the model."
        )
    return {**figures, "tolerance": tolerance}


def _same(found: Iterable[Any], expected: Iterable[Tensor]) -> bool:
    """Whether all values are equal. PEFT keeps an adapter in float32, which holds every factor exactly."""
    return all(torch.equal(*(tensor.double() for tensor in pair)) for pair in zip(found, expected, strict=True))
