"""torchao weight tensors inside a plain nn.Linear: int8 and intx (2 to 4 bits in groups)."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ...errors import BackendError
from ..base import Backend, Scheme, StoredModule
from ..registry import register

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
            raise BackendError(_unsupported(type(module.weight).__name__))
        return [codes]

    def scales(self, module: Any) -> list[Tensor]:
        return [module.weight.scale]

    def scheme(self, module: Any) -> Scheme:
        weight: Any = module.weight
        block = weight.block_size[-1]
        bits = self._bits(module)
        mapping = "symmetric" if self._zero_points(module) is None else "asymmetric"
        return Scheme(f"int{bits}", bits, None if block == module.in_features else block, (mapping,))

    def stored_scheme(self, module: StoredModule, config: Mapping[str, Any]) -> Scheme | None:
        kind = json.loads(module.metadata.get("weight", "{}"))
        if kind.get("_type", "Tensor") == "Tensor":
            return None
        if "_weight_qdata" not in module.shapes:
            raise BackendError(_unsupported(kind["_type"]))
        settings = kind["_data"]
        digits = re.search(r"int(\d+)$", str(settings.get("target_dtype", {}).get("_data")))
        bits, block = int(digits.group(1)) if digits else 8, settings["block_size"][-1]
        mapping = "asymmetric" if _mapping(module.name, config) == "ASYMMETRIC" else "symmetric"
        return Scheme(f"int{bits}", bits, None if block == module.shapes["_weight_qdata"][-1] else block, (mapping,))

    def rounds_inputs(self, module: Any) -> bool:
        settings = ("act_quant_kwargs", "activation_quantization")  # by tensor class
        return any(getattr(module.weight, setting, None) is not None for setting in settings)

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


def _unsupported(kind: str) -> str:
    return f"torchao's {kind} keeps no qdata; supported: int8 and intx weight-only."


def _mapping(name: str, config: Mapping[str, Any]) -> str | None:
    """The `mapping_type` that a stored config gives a module."""
    found: Any = config.get("quant_type", {}).get("default", {}).get("_data", {})
    by_name = found.get("fqn_to_config", found.get("module_fqn_to_config"))
    if by_name is not None:
        found = (by_name.get(name, by_name.get(f"{name}.weight", by_name.get("_default"))) or {}).get("_data", {})
    mapping: str | None = found.get("mapping_type", {}).get("_data")
    return mapping
