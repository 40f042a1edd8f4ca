"""optimum-quanto (`QLinear`): int2 and int4 with one scale per group, int8 and float8 with one scale per row."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import BackendError
from ..base import Backend, Scheme, Unavailable, changed
from ..registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn

_NEXT = {"int2": "int4", "int4": "int8"}


def _config(weights: str) -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights=weights)


@register
class Quanto(Backend):
    """`optimum.quanto.QLinear` with a frozen weight and without quantized activations.

    quanto chooses a tensor class by device and dtype, and each class packs the weight differently. Codes, scales and
    shifts are read from the packing that quanto saves. This packing is the same on every device, so that a correction
    is valid on every device.
    """

    name = "quanto"
    package = "optimum.quanto"
    extra = "quanto"
    tested = ">=0.2.7,<0.3"
    methods = ("quanto",)
    saves = "never"
    zero_scales = True
    presets: ClassVar = {f"quanto-{kind}": partial(_config, kind) for kind in ("int2", "int4", "int8", "float8")}

    def matches(self, module: nn.Module) -> bool:
        quanto = sys.modules.get("optimum.quanto")
        return quanto is not None and isinstance(module, quanto.QLinear)

    def weight(self, module: Any) -> Tensor:
        weight = self._quantized(module)
        tensor: Tensor = weight.dequantize() if not _is_tinygemm(weight) else _tinygemm_weight(weight)
        return tensor

    def codes(self, module: Any) -> list[Tensor]:
        import torch

        weight = self._portable(module)
        shift = getattr(weight, "_shift", None)
        zero_points = [] if shift is None or shift.is_floating_point() else [shift]
        codes = getattr(weight._data, "_data", weight._data)
        return [codes.view(torch.uint8), *zero_points]

    def scales(self, module: Any) -> list[Tensor]:
        return [self._portable(module)._scale]

    def offsets(self, module: Any) -> list[Tensor]:
        shift = getattr(self._portable(module), "_shift", None)
        return [shift] if shift is not None and shift.is_floating_point() else []

    def scheme(self, module: Any) -> Scheme:
        weight = self._quantized(module)
        group = getattr(weight, "_group_size", None)
        mapping = "asymmetric" if weight.qtype.bits < 8 else "symmetric"
        return Scheme(weight.qtype.name, weight.qtype.bits, None if group == module.in_features else group, (mapping,))

    def finer(self, config: Any) -> Unavailable:
        return Unavailable("quanto has no setting for the size of its groups")

    def wider(self, config: Any) -> Any | Unavailable:
        if config.weights not in _NEXT:
            return Unavailable("8 bits are the most that quanto quantizes a weight to")
        return changed(config, weights=_NEXT[config.weights])

    def partner(self, config: Any) -> None:
        return None  # transformers has one width for all modules that it does not leave alone

    def mixed(self, config: Any, wide: Sequence[str], others: Sequence[str], dense: Sequence[str]) -> Any:
        return changed(config, modules_to_not_convert=[*(config.modules_to_not_convert or dense), *wide])

    def packed_bytes(self, module: Any) -> int:
        shift = getattr(self._portable(module), "_shift", None)
        return super().packed_bytes(module) + (0 if shift is None else shift.numel() * shift.element_size())

    @staticmethod
    def _quantized(module: Any) -> Any:
        if not module.frozen:
            raise BackendError(
                "a QLinear still holds its full-precision weight; call optimum.quanto.freeze(model) first. If its "
                "checkpoint lacks this module (a new head), name the module in modules_to_not_convert."
            )
        if module.activation_qtype is not None:
            raise BackendError(
                f"a QLinear quantizes its activations to {module.activation_qtype.name}, which glowq does not correct; "
                "quantize the weights alone (activations=None)."
            )
        return module.weight

    @classmethod
    def _portable(cls, module: Any) -> Any:
        """The weight, converted to the tensor class that quanto saves."""
        from optimum.quanto import WeightQBitsTensor, WeightQBytesTensor

        weight = cls._quantized(module)
        if type(weight) in (WeightQBitsTensor, WeightQBytesTensor):
            return weight
        return weight.weight_qbits_tensor() if isinstance(weight, WeightQBitsTensor) else weight.weight_qbytes_tensor()


def _is_tinygemm(weight: Any) -> bool:
    from optimum.quanto.tensor.weights.tinygemm import TinyGemmWeightQBitsTensor

    return isinstance(weight, TinyGemmWeightQBitsTensor)


def _tinygemm_weight(weight: Any) -> Tensor:
    """The weight that the int4 kernel of bfloat16 models multiplies by, float32, shape (out_features, in_features).

    The kernel counts codes from the middle of their range. quanto's own dequantize converts the kernel's offsets to
    shifts in bfloat16. The weight that it returns differs from the kernel's by 0.5% in the Frobenius norm.
    """
    scale, middle = weight._scale_shift.float().unbind(-1)  # each (in_features / group, out_features)
    wide = [part.t().repeat_interleave(weight._group_size, dim=1) for part in (scale, middle)]
    return (weight._data.unpack().float() - 2 ** (weight.qtype.bits - 1)) * wide[0] + wide[1]
