"""HQQ (`HQQLinear`), quantized by the hqq library itself.

transformers 5 cannot quantize with HQQ, and loads random weights for a model that HQQ saved. So there are two ways to
use HQQ. `GlowQConfig(base="hqq-4")` quantizes full-precision weights while loading. A model that HQQ saved is a pickle:
it is loaded with hqq and corrected in memory.

HQQ searches zero points in float16 on a GPU and in float32 on a CPU. A model that is quantized while loading therefore
has different weights on a GPU and on a CPU. The fingerprint shows this difference.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from ...errors import BackendError
from ..base import Backend, Scheme, StoredModule, Unavailable, changed
from ..registry import register

__all__ = ["HQQ", "LOAD", "HQQHfQuantizer"]

GROUP_SIZE = 64  # HQQ's own default
_GROUP_STEP = 8
_NEXT_BITS = {1: 2, 2: 3, 3: 4, 4: 8}
_SETTINGS = "weight_quant_params"  # of HQQ's own config; a config by name of modules does not have it
LOAD = (
    "load the model with hqq.models.hf.base.AutoHQQHFModel.from_quantized(folder), then call "
    "glowq.load_correction(model, ...) or glowq.correct(model, ...); or quantize the full-precision model with "
    "GlowQConfig(base='hqq-4')"
)


def _config(bits: int) -> Any:
    from transformers import HqqConfig

    return HqqConfig(nbits=bits, group_size=GROUP_SIZE)


@register
class HQQ(Backend):
    """`hqq.core.quantize.HQQLinear`. Scales and zero points are floats or, in older files, quantized themselves."""

    name = "hqq"
    package = "hqq"
    extra = "hqq"
    tested = ">=0.2.8,<0.3"
    methods = ("hqq",)
    saves = "never"
    presets: ClassVar = {f"hqq-{bits}": partial(_config, bits) for bits in (2, 3, 4, 8)}

    def matches(self, module: nn.Module) -> bool:
        hqq = sys.modules.get("hqq.core.quantize")
        return hqq is not None and isinstance(module, hqq.HQQLinear)

    def weight(self, module: Any) -> Tensor:
        self._meta(module)
        weight: Tensor = module.dequantize()
        return weight

    def codes(self, module: Any) -> list[Tensor]:
        meta = self._meta(module)
        stored = module.W_q.data
        # With `view_as_float`, the packed integers have a float dtype. Some of them then look like NaN.
        codes = stored.view(meta["unpack_view_dtype"]) if stored.is_floating_point() else stored
        return [codes, *(tensor for tensor in _tensors(meta) if not tensor.is_floating_point())]

    def scales(self, module: Any) -> list[Tensor]:
        meta = self._meta(module)
        if meta["quant_scale"]:
            return [meta["meta_scale"]["scale"]]
        return [meta["scale"] if "scale" in meta else meta["zero_scale"][1]]

    def offsets(self, module: Any) -> list[Tensor]:
        return [tensor for tensor in _tensors(self._meta(module)) if tensor.is_floating_point()]

    def scheme(self, module: Any) -> Scheme:
        meta = self._meta(module)
        details = [] if meta["axis"] == 1 else ["groups across rows"]
        details += [f"quantized {part}s" for part in ("scale", "zero") if meta[f"quant_{part}"]]
        group = None if meta["axis"] == 1 and meta["group_size"] == meta["shape"][1] else meta["group_size"]
        return Scheme(f"hqq{meta['nbits']:g}", meta["nbits"], group, tuple(details))

    def packed_bytes(self, module: Any) -> int:
        out_features, in_features = self.features(module)
        meta = self._meta(module)
        extra = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(meta))
        return int(out_features * in_features * meta["nbits"]) // 8 + extra

    def finer(self, config: Any) -> Any | Unavailable:
        size = config.quant_config.get(_SETTINGS, {}).get("group_size")
        if not size or size % (2 * _GROUP_STEP):
            return Unavailable(
                f"HQQ's groups hold multiples of {_GROUP_STEP} values, or there is more than one setting"
            )
        return _with(config, group_size=size // 2)

    def wider(self, config: Any) -> Any | Unavailable:
        bits = config.quant_config.get(_SETTINGS, {}).get("nbits")
        if bits not in _NEXT_BITS:
            return Unavailable("HQQ packs 8 bits at most, or there is more than one setting")
        return _with(config, nbits=_NEXT_BITS[bits])

    def partner(self, config: Any) -> Any | Unavailable:
        return self.wider(config)

    def partner_bits(self, bits: float) -> float | None:
        return _NEXT_BITS.get(int(bits))

    def mixed(self, config: Any, wide: Sequence[str], others: Sequence[str], dense: Sequence[str]) -> Any:
        from transformers.integrations.hqq import name_to_linear_tag

        settings = {name_to_linear_tag(name): config.quant_config for name in others}
        wider: Any = self.wider(config)
        settings |= dict.fromkeys(wide, wider.quant_config)
        return changed(config, quant_config=settings)

    def quantizers(self) -> dict[str, type]:
        from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

        # transformers' quantizer cannot quantize and loads random weights. It is not replaced once it can quantize.
        return {} if "get_quantize_ops" in vars(HqqHfQuantizer) else {"hqq": HQQHfQuantizer}

    def stored_scheme(self, module: StoredModule, config: Mapping[str, Any]) -> Scheme | None:
        if "W_q" not in module.shapes:
            return None
        raise BackendError(f"transformers loads no HQQ weights: {LOAD}")

    @staticmethod
    def _meta(module: Any) -> Mapping[str, Any]:
        if not module.ready:
            raise BackendError("an HQQLinear holds no quantized weight; quantize or load it with hqq first.")
        return module.meta


def _tensors(meta: Mapping[str, Any]) -> Iterator[Tensor]:
    """Scales and zero points; if they are quantized themselves, also their own scales and zero points."""
    for _, value in sorted(meta.items()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value)


def _with(config: Any, **settings: Any) -> Any:
    """A copy of an `HqqConfig` whose setting for all layers is changed; HQQ sets what depends on it."""
    from transformers import HqqConfig

    same = {name: config.quant_config[_SETTINGS][name] for name in ("nbits", "group_size", "axis", "view_as_float")}
    return changed(config, quant_config=HqqConfig(**{**same, **settings}).quant_config)


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
        if _SETTINGS in settings:
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

    group = settings[_SETTINGS]["group_size"]
    if group is not None and linear.weight.numel() % group:
        raise BackendError(
            f"{name} has shape {tuple(linear.weight.shape)}, which HQQ cannot cut into groups of {group}; give a "
            "group_size that divides it, or name the layer in skip_modules."
        )
    with torch.no_grad():
        return HQQLinear(linear, settings, compute_dtype=linear.weight.dtype, device=str(linear.weight.device))
