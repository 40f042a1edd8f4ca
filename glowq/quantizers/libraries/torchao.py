"""torchao weight tensors inside a plain nn.Linear: int8, intx (2 to 4 bits in groups), packed int4 and float8."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import BackendError
from ..base import Backend, Scheme, StoredModule, Unavailable
from ..registry import register
from ._torchao_mixing import NEXT_BITS, finer, mixed, wider

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

GROUP_SIZE = 64

# The supported tensor classes. Each class has its own layout of `qdata`, so other classes with a `qdata` are refused.
_CLASSES = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Int4Tensor", "Float8Tensor")


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
            # torchao's default, symmetric, needs no zero points; with 2 bits it would leave one of four levels unused.
            mapping_type=MappingType.ASYMMETRIC if bits == 2 else MappingType.SYMMETRIC,
        )
    )


@register
class TorchAO(Backend):
    """`nn.Linear` modules whose weight is one of torchao's tensor classes in `_CLASSES`."""

    name = "torchao"
    package = "torchao"
    extra = "torchao"
    tested = ">=0.15,<0.19"
    methods = ("torchao",)
    presets: ClassVar = {"torchao-int8": _int8} | {f"torchao-int{bits}": partial(_intx, bits) for bits in (2, 3, 4)}

    def rename_stored(self, quantizer: Any, rename: Callable[[str], str]) -> None:
        stored = getattr(quantizer, "metadata", {})
        names = json.loads(stored.get("tensor_names", "[]"))
        renamed = {name: ".".join([rename(name.rpartition(".")[0]), name.rpartition(".")[2]]) for name in names}
        moved = {renamed.get(key, key): value for key, value in stored.items()}
        quantizer.metadata = {**moved, "tensor_names": json.dumps(list(renamed.values()))}

    def finer(self, config: Any) -> Any | Unavailable:
        return finer(config)

    def wider(self, config: Any) -> Any | Unavailable:
        return wider(config)

    def partner(self, config: Any) -> Any | Unavailable:
        return wider(config)

    def partner_bits(self, bits: float) -> float | None:
        return NEXT_BITS.get(int(bits))

    def mixed(self, config: Any, wide: Sequence[str], others: Sequence[str], dense: Sequence[str]) -> Any:
        return mixed(config, wider(config), wide, others)

    def matches(self, module: nn.Module) -> bool:
        from torch import nn

        from ..experts import ExpertLinear

        if not isinstance(module, nn.Linear):
            return False
        return _is_packed(module.stack if isinstance(module, ExpertLinear) else module.weight)

    def holds_experts(self, stack: Tensor) -> bool:
        return _is_packed(stack)

    def prepare(self, module: Any, dtype: torch.dtype) -> None:
        _known(module)

    def weight(self, module: Any) -> Tensor:
        weight = _known(module)
        if type(weight).__name__ == "Int4Tensor":
            return _int4_weight(weight)
        tensor: Tensor = weight.dequantize()
        return tensor

    def codes(self, module: Any) -> list[Tensor]:
        import torch

        codes = _known(module).qdata
        return [codes.view(torch.uint8) if codes.is_floating_point() else codes]

    def scales(self, module: Any) -> list[Tensor]:
        return [_known(module).scale]

    def offsets(self, module: Any) -> list[Tensor]:
        zeros = self._zero_points(module)
        return [] if zeros is None else [zeros]

    def scheme(self, module: Any) -> Scheme:
        weight = _known(module)
        rows, block = _block(weight.block_size, module.weight.shape)
        group = None if block == module.in_features else block
        if type(weight).__name__ == "Float8Tensor":
            return _float8(str(weight.qdata.dtype).removeprefix("torch."), group, rows, module.out_features)
        bits = self._bits(module)
        mapping = "symmetric" if self._zero_points(module) is None else "asymmetric"
        return Scheme(f"int{bits}", bits, group, (mapping,))

    def stored_scheme(self, module: StoredModule, config: Mapping[str, Any]) -> Scheme | None:
        kind = json.loads(module.metadata.get("weight", "{}"))
        name = kind.get("_type", "Tensor")
        if name == "Tensor":
            return None
        if name not in _CLASSES or "_weight_qdata" not in module.shapes:
            raise BackendError(_unsupported(name))
        settings = kind["_data"]
        outputs, inputs = module.shapes["_weight_qdata"]
        inputs *= 2 if name == "Int4Tensor" else 1
        block_size = settings["block_size"]
        rows, block = _block(block_size and block_size[-2:], (outputs, inputs))
        group = None if block == inputs else block
        if name == "Float8Tensor":
            return _float8(_FLOAT8[module.dtypes["_weight_qdata"]], group, rows, outputs)
        if name == "Int4Tensor":
            rounded = "float8" in str((settings.get("activation_dtype") or {}).get("_data"))
            return Scheme("int4", 4, group, ("symmetric" if rounded else "asymmetric",))
        digits = re.search(r"int(\d+)$", str(settings.get("target_dtype", {}).get("_data")))
        bits = int(digits.group(1)) if digits else 8
        mapping = "asymmetric" if _mapping(module.name, config) == "ASYMMETRIC" else "symmetric"
        return Scheme(f"int{bits}", bits, group, (mapping,))

    def rounds_inputs(self, module: Any) -> bool:
        import torch

        weight = _known(module)
        settings = ("act_quant_kwargs", "activation_quantization")  # the name depends on the tensor class
        if any(getattr(weight, setting, None) is not None for setting in settings):
            return True
        return getattr(weight, "activation_dtype", torch.bfloat16).itemsize == 1

    def packed_bytes(self, module: Any) -> int:
        zeros = self._zero_points(module)
        return super().packed_bytes(module) + (0 if zeros is None else zeros.numel() * zeros.element_size())

    @staticmethod
    def _zero_points(module: Any) -> Tensor | None:
        """The zero points, or None if the mapping is symmetric. int8 stores zero points of zero even then."""
        zeros = getattr(_known(module), "zero_point", None)
        return zeros if zeros is not None and bool(zeros.any()) else None

    @staticmethod
    def _bits(module: Any) -> int:
        weight = _known(module)
        if type(weight).__name__ == "Int4Tensor":
            return 4
        digits = re.search(r"int(\d+)$", str(getattr(weight, "target_dtype", None)))
        return int(digits.group(1)) if digits else 8


_FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # dtype in safetensors -> dtype in torch


def _is_packed(weight: Tensor) -> bool:
    if "torchao" not in sys.modules:
        return False
    from torchao.utils import TorchAOBaseTensor

    return isinstance(weight, TorchAOBaseTensor)


def _known(module: Any) -> Any:
    """The module's weight, after a check that it is of a supported class.

    Raises:
        BackendError: the class is not supported, or the weight scales its inputs.
    """
    from torchao import quantization

    weight = module.weight
    kind = type(weight).__name__
    if kind not in _CLASSES or type(weight) is not getattr(quantization, kind, None):
        raise BackendError(_unsupported(kind))
    if getattr(weight, "act_pre_scale", None) is not None:
        raise BackendError(
            f"torchao's {kind} multiplies its inputs by act_pre_scale, which glowq does not correct; quantize the "
            "weights without it (no AWQ or SmoothQuant of torchao's)."
        )
    return weight


def _int4_weight(weight: Any) -> Tensor:
    """The weight that torchao's kernel multiplies by, float32. The tensor class itself has no dequantize.

    A byte holds two codes from -8 to 7; the code of the even column is in the lower half. The weight is
    code * scale + zero point. Scale and zero point have the shape (in_features / group, out_features).
    """
    import torch

    packed = weight.qdata
    codes = torch.stack([packed << 4 >> 4, packed >> 4], dim=-1).reshape(weight.shape).float()
    scale, zero = (
        part.float().t().repeat_interleave(weight.block_size[-1], dim=1) for part in (weight.scale, weight.zero_point)
    )
    return (codes + 8) * scale + (zero - 8 * scale)  # torchao's order of operations, for the same bits


def _block(block_size: Sequence[int] | None, shape: Sequence[int]) -> tuple[int, int]:
    """Numbers of rows and columns that share a scale. torchao writes no block size if the whole weight shares one."""
    rows, columns = block_size or shape
    return rows, columns


def _float8(name: str, group: int | None, rows: int, out_features: int) -> Scheme:
    shared = "shared by all rows" if rows == out_features else f"shared by {rows} rows"
    return Scheme(name, 8, group, (shared,) if rows > 1 else ())


def _unsupported(kind: str) -> str:
    return (
        f"torchao's {kind} cannot be read; supported: {', '.join(_CLASSES)}, which weight-only int8, intx, plain int4 "
        "and float8 configs write."
    )


def _mapping(name: str, config: Mapping[str, Any]) -> str | None:
    """The `mapping_type` that a stored config gives a module."""
    found: Any = config.get("quant_type", {}).get("default", {}).get("_data", {})
    by_name = found.get("fqn_to_config", found.get("module_fqn_to_config"))
    if by_name is not None:
        keys = [key for key in by_name if key.startswith("re:")]
        matching = next((key for key in keys if re.fullmatch(key[3:], f"{name}.weight")), "_default")
        found = (by_name.get(name, by_name.get(f"{name}.weight", by_name.get(matching))) or {}).get("_data", {})
    mapping: str | None = found.get("mapping_type", {}).get("_data")
    return mapping
