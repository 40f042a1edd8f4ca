"""torchao weight tensors inside a plain nn.Linear: int8 and intx (2 to 4 bits in groups)."""

from __future__ import annotations

import re
import sys
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import BackendError
from . import Backend, Scheme, register

GROUP_SIZE = 64


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _intx(bits: int) -> Any:
    import torch
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType
    from transformers import TorchAoConfig

    return TorchAoConfig(
        IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=PerGroup(GROUP_SIZE),
            # torchao's default, symmetric, needs no zero points; at 2 bits it would waste one of four levels.
            mapping_type=MappingType.ASYMMETRIC if bits == 2 else MappingType.SYMMETRIC,
        )
    )


@register
class TorchAO(Backend):
    """`nn.Linear` whose weight is a torchao tensor subclass with integer `qdata`."""

    name = "torchao"
    package = "torchao"
    extra = "torchao"
    tested = ">=0.15,<0.19"
    methods = ("torchao",)
    presets: ClassVar = {"torchao-int8": _int8} | {f"torchao-int{bits}": partial(_intx, bits) for bits in (2, 3, 4)}

    def matches(self, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear) or "torchao" not in sys.modules:
            return False
        from torchao.utils import TorchAOBaseTensor

        return isinstance(module.weight, TorchAOBaseTensor)

    def weight(self, module: Any) -> Tensor:
        return module.weight.dequantize()

    def codes(self, module: Any) -> list[Tensor]:
        codes = getattr(module.weight, "qdata", None)
        if codes is None:
            raise BackendError(
                f"torchao's {type(module.weight).__name__} keeps no qdata; supported: int8 and intx weight-only."
            )
        return [codes]

    def scales(self, module: Any) -> list[Tensor]:
        return [module.weight.scale]

    def scheme(self, module: Any) -> Scheme:
        weight: Any = module.weight
        block = weight.block_size[-1]
        bits = self._bits(module)
        mapping = "symmetric" if self._zero_points(module) is None else "asymmetric"
        return Scheme(f"int{bits}", bits, None if block == module.in_features else block, (mapping,))

    def packed_bytes(self, module: Any) -> int:
        zeros = self._zero_points(module)
        return super().packed_bytes(module) + (0 if zeros is None else zeros.numel() * zeros.element_size())

    @staticmethod
    def _zero_points(module: Any) -> Tensor | None:
        """The zero points, or None where the mapping is symmetric: int8 stores a zero a row even there."""
        zeros = getattr(module.weight, "zero_point", None)
        return zeros if zeros is not None and bool(zeros.any()) else None

    @staticmethod
    def _bits(module: Any) -> int:
        target = getattr(module.weight, "target_dtype", None)
        digits = re.search(r"int(\d+)$", str(target))
        return int(digits.group(1)) if digits else 8
