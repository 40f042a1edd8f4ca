"""Read and check the files of a LoRA adapter, adapter_config.json and adapter_model.safetensors, without a model."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...errors import ConfigError, CorrectionError, ModelNotFoundError
from ...utils.files import read_json, refuse_pickles
from ...utils.output import EXPORT_MANIFEST
from ...utils.snapshots import local_snapshot

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "KEY_PREFIX", "Adapter", "read_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

_REFUSED = {  # field of adapter_config.json -> why an adapter that uses it does more than W + s B A
    "bias": "it changes biases",
    "fan_in_fan_out": "its weights are stored transposed",
    "layer_replication": "it replicates layers",
    "lora_bias": "lora_B has a bias",
    "modules_to_save": "it replaces whole modules",
    "target_parameters": "it changes parameters that belong to no linear module, such as those of experts",
    "trainable_token_indices": "it replaces embeddings",
    "use_dora": "DoRA rescales the whole weight",
}
_INITIALS = (True, False, None, "gaussian", "eva", "orthogonal", "loftq")  # the others change the base's weights
_HARMLESS = {  # fields about training or use, and fields that are read elsewhere in this file
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
_KEY = re.compile(rf"(?:{re.escape(KEY_PREFIX)})?(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        name: folder or Hub name, as the caller gave it.
        base_model: name of the base in the adapter's config.
        fingerprint: fingerprint of the base's quantized weights if `glowq export` wrote the adapter, otherwise None.
        pairs: module name -> (lora_A (r, d) as stored, lora_B (o, r) times the module's scale, float64).
    """

    name: str
    base_model: str | None
    fingerprint: str | None
    pairs: Mapping[str, tuple[Tensor, Tensor]]


def read_adapter(path: str | os.PathLike[str], **hub_kwargs: Any) -> Adapter:
    """Read a LoRA adapter that only adds the scaled product lora_B lora_A to the weights of linear modules.

    Raises:
        ModelNotFoundError: no such folder or Hub name, or it holds no adapter.
        PickleRefusedError: its weights are a pickle.
        ConfigError: it is not a LoRA adapter, or it changes the model in another way too.
        CorrectionError: its files are corrupt, or its tensors do not fit its config.
    """
    folder, name = local_snapshot(path, **hub_kwargs), os.fspath(path)
    refuse_pickles(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelNotFoundError(f"{name} holds no {ADAPTER_CONFIG}; expected the folder of a LoRA adapter.")
    settings = read_json(folder / ADAPTER_CONFIG)
    _check_settings(name, settings)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _tensors(folder / ADAPTER_WEIGHTS).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ConfigError(
                f"{name} holds the tensor {key!r}, which is neither lora_A nor lora_B of a linear module: trained "
                "embeddings, whole modules, magnitudes or biases are no part of a low-rank correction."
            )
        pairs.setdefault(match["module"], {})[match["part"]] = tensor
    manifest = read_json(folder / EXPORT_MANIFEST) if (folder / EXPORT_MANIFEST).is_file() else {}
    scaled = {module: _pair(name, module, found, settings) for module, found in pairs.items()}
    return Adapter(name, settings.get("base_model_name_or_path"), manifest.get("fingerprint"), scaled)


def _tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ModelNotFoundError(f"{file} is missing; the adapter is incomplete.")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CorrectionError(f"{file} is corrupt or truncated ({error}); download the adapter again.") from error


def _check_settings(name: str, settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{name} is a {kind} adapter; only LORA adds a low-rank product to each weight.")
    for field, value in sorted(settings.items()):
        if not value or value == "none" or field in _HARMLESS:
            continue
        reason = _REFUSED.get(field, "glowq does not support this field, which may change the weights")
        raise ConfigError(f"{name} cannot be a correction: {field} is {value!r} in its {ADAPTER_CONFIG}: {reason}.")
    initial = settings.get("init_lora_weights")
    if initial not in _INITIALS:
        raise ConfigError(
            f"{name} cannot be a correction of its base: init_lora_weights is {initial!r}, which changes the base's "
            "weights too. Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )


def _pair(name: str, module: str, found: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    a, b = found.get("A"), found.get("B")
    if a is None or b is None:
        raise CorrectionError(f"{name} holds only one of lora_A and lora_B of {module!r}; the adapter is incomplete.")
    if (
        a.dim() != 2
        or b.dim() != 2
        or b.shape[1] != a.shape[0]
        or not (a.is_floating_point() and b.is_floating_point())
    ):
        raise CorrectionError(
            f"{name}: lora_A of {module!r} has shape {tuple(a.shape)}, lora_B {tuple(b.shape)}; expected float tensors "
            "(r, inputs) and (outputs, r)."
        )
    scale = 1.0 if _is_of_gptqmodel(settings) else _scale(name, module, len(a), settings)
    return a, b.to(torch.float64) * scale


def _is_of_gptqmodel(settings: Mapping[str, Any]) -> bool:
    """Whether GPTQModel wrote the config. Its EoRA does not scale by alpha, even if modules have different ranks.

    PEFT writes every field, with null for fields that are not set, and newer versions of PEFT write "peft_version".
    """
    return "peft_version" not in settings and None not in settings.values()


def _scale(name: str, module: str, rank: int, settings: Mapping[str, Any]) -> float:
    stated = _setting(name, module, settings, "rank_pattern", "r")
    if stated != rank:
        raise CorrectionError(f"{name}: {module!r} has rank {rank}, and its {ADAPTER_CONFIG} says {stated:g}.")
    alpha = _setting(name, module, settings, "alpha_pattern", "lora_alpha")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _setting(name: str, module: str, settings: Mapping[str, Any], patterns: str, default: str) -> float:
    """A module's rank or alpha, as PEFT looks it up (peft.utils.other.get_pattern_key)."""
    found = settings.get(patterns) or {}
    try:
        pattern = next((key for key in found if re.match(rf"(.*\.)?({key})$", module)), None)
        value = settings[default] if pattern is None else found[pattern]
    except (KeyError, TypeError, re.error) as error:
        raise CorrectionError(
            f"{name}: {patterns} or {default} in its {ADAPTER_CONFIG} cannot be read: {error}."
        ) from error
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CorrectionError(f"{name}: {default} of {module!r} must be a number above 0, found {value!r}.")
    return float(value)
