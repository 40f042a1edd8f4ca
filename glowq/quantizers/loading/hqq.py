"""Quantize a model with HQQ while transformers loads it; the quantizer that transformers 5 has for HQQ cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from ...errors import BackendError

__all__ = ["LOAD", "SETTINGS", "HQQHfQuantizer"]

SETTINGS = "weight_quant_params"  # of HQQ's own config; a config by name of modules does not have it
LOAD = (
    "load the model with hqq.models.hf.base.AutoHQQHFModel.from_quantized(folder), then call "
    "glowq.load_correction(model, ...) or glowq.correct(model, ...); or quantize the full-precision model with "
    "GlowQConfig(base='hqq-4')"
)


class HQQHfQuantizer(HfQuantizer):
    """Loads full-precision weights, then lets HQQ quantize one linear layer after another on the layer's device.

    Raises:
        BackendError: the checkpoint is quantized already.
    """

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if self.pre_quantized:
            raise BackendError(
                f"transformers would load random weights for a model that HQQ quantized. Instead, {LOAD}."
            )

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse to offload.

        Raises:
            BackendError: `device_map` names the disk, or the CPU beside another device.
        """
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise BackendError(
                "HQQ's layers cannot be offloaded, because accelerate does not find their scales; give a device_map "
                "without 'disk', and without 'cpu' beside another device."
            )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _quantize(model, self.quantization_config)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Always false: transformers cannot load such a model again."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Always true: HQQ's layers compute gradients of their inputs."""
        return True


def _quantize(model: nn.Module, config: Any) -> None:
    """Replace every linear layer that HQQ's own AutoHQQHFModel would quantize with an HQQLinear.

    Args:
        model: the loaded full-precision model.
        config: `HqqConfig`. Its `quant_config` holds settings for all layers, or settings by tag ("self_attn.q_proj")
            and by name ("layers.0.self_attn.q_proj"), which HQQ itself has no keys for.

    Raises:
        BackendError: the config leaves no layer to quantize, or a layer cannot be divided into groups.
    """
    from transformers.integrations.hqq import name_to_linear_tag

    def settings_of(name: str) -> Any:
        if not {name, name.rpartition(".")[2], name_to_linear_tag(name)}.isdisjoint(config.skip_modules or ()):
            return None
        settings = config.quant_config
        if SETTINGS in settings:
            return settings
        # A key is a tag, which names all layers' modules of a kind, or a name, which may lack the model's prefix.
        named = [key for key in settings if f".{name}".endswith(f".{key}") and key != name_to_linear_tag(key)]
        return settings.get(named[0] if named else name_to_linear_tag(name))

    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    chosen = {name: settings for name in linears if (settings := settings_of(name)) is not None}
    if not chosen:
        raise BackendError(
            f"{type(model).__name__} holds no linear layer that the HqqConfig names; its layers are "
            f"{', '.join(sorted({name_to_linear_tag(name) for name in linears})) or 'of other kinds'}."
        )
    for name, settings in chosen.items():
        model.set_submodule(name, _quantized(name, linears[name], settings))


def _quantized(name: str, linear: nn.Linear, settings: Mapping[str, Any]) -> nn.Module:
    from hqq.core.quantize import HQQLinear

    group = settings[SETTINGS]["group_size"]
    if group is not None and linear.weight.numel() % group:
        raise BackendError(
            f"{name} has shape {tuple(linear.weight.shape)}, which HQQ cannot cut into groups of {group}; give a "
            "group_size that divides it, or name the layer in skip_modules."
        )
    with torch.no_grad():
        return HQQLinear(linear, settings, compute_dtype=linear.weight.dtype, device=str(linear.weight.device))
