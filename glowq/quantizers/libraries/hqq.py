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
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import BackendError
from ..base import Backend, Scheme, StoredModule, Unavailable, changed
from ..registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn

GROUP_SIZE = 64  # HQQ's own default
_GROUP_STEP = 8
_NEXT_BITS = {1: 2, 2: 3, 3: 4, 4: 8}


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
        from ..loading.hqq import SETTINGS

        size = config.quant_config.get(SETTINGS, {}).get("group_size")
        if not size or size % (2 * _GROUP_STEP):
            return Unavailable(
                f"HQQ's groups hold multiples of {_GROUP_STEP} values, or there is more than one setting"
            )
        return _with(config, group_size=size // 2)

    def wider(self, config: Any) -> Any | Unavailable:
        from ..loading.hqq import SETTINGS

        bits = config.quant_config.get(SETTINGS, {}).get("nbits")
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
        if "get_quantize_ops" in vars(HqqHfQuantizer):
            return {}
        from ..loading.hqq import HQQHfQuantizer

        return {"hqq": HQQHfQuantizer}

    def stored_scheme(self, module: StoredModule, config: Mapping[str, Any]) -> Scheme | None:
        if "W_q" not in module.shapes:
            return None
        from ..loading.hqq import LOAD

        raise BackendError(f"transformers loads no HQQ weights: {LOAD}")

    @staticmethod
    def _meta(module: Any) -> Mapping[str, Any]:
        if not module.ready:
            raise BackendError("an HQQLinear holds no quantized weight; quantize or load it with hqq first.")
        return module.meta


def _tensors(meta: Mapping[str, Any]) -> Iterator[Tensor]:
    """Scales and zero points; if they are quantized themselves, also their own scales and zero points."""
    from torch import Tensor

    for _, value in sorted(meta.items()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value)


def _with(config: Any, **settings: Any) -> Any:
    """A copy of an `HqqConfig` whose setting for all layers is changed; HQQ sets what depends on it."""
    from transformers import HqqConfig

    from ..loading.hqq import SETTINGS

    same = {name: config.quant_config[SETTINGS][name] for name in ("nbits", "group_size", "axis", "view_as_float")}
    return changed(config, quant_config=HqqConfig(**{**same, **settings}).quant_config)
