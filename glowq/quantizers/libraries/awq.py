"""AWQ: gptqmodel's AWQ modules. AutoAWQ's checkpoints are loaded into the same modules."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import BackendError, RepackedWeightError
from ..base import Backend, Scheme, StoredModule
from ..registry import register
from ._gptqmodel import keep_readable, let_rewrite

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@register
class AWQ(Backend):
    """`gptqmodel` modules that keep AWQ's GEMM layout.

    Before it rounds, AWQ multiplies the weight's columns by channel scales, and divides the layers before by the same
    scales. The quantized weight is therefore not a rounded version of the original one; see
    `glowq.models.channel_scales`.
    """

    name = "awq"
    package = "gptqmodel"
    extra = "awq"
    tested = ">=7.6,<7.7"
    methods = ("awq",)
    saves = "files"  # in memory, the module rounds its scales to the dtype of its input
    loads_experts = True

    def quantizers(self) -> dict[str, type]:
        from transformers.quantizers.quantizer_awq import AwqQuantizer

        from ..loading.divided_experts import loading_experts

        return {"awq": loading_experts(AwqQuantizer)}

    def matches(self, module: nn.Module) -> bool:
        library = sys.modules.get("gptqmodel.nn_modules.qlinear")
        return library is not None and isinstance(module, library.AWQuantLinear)

    def prepare(self, module: Any, dtype: torch.dtype) -> None:
        import torch

        keep_readable(module)
        # The first forward rounds the scales to its input's dtype, which changes the weight. Round them before a read.
        if module.scales is not None and not module.scales.is_meta:
            module.scales = module.scales.to(dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16)

    def release(self, module: Any) -> bool:
        return let_rewrite(module)

    def weight(self, module: Any) -> Tensor:
        from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

        self._check(module)
        return dequantize_gemm(
            qweight=module.qweight,
            qzeros=module.qzeros,
            scales=module.scales.float(),
            bits=module.bits,
            group_size=module.group_size,
        ).T

    def codes(self, module: Any) -> list[Tensor]:
        self._check(module)
        return [module.qweight, module.qzeros]

    def scales(self, module: Any) -> list[Tensor]:
        self._check(module)
        return [module.scales]

    def scheme(self, module: Any) -> Scheme:
        self._check(module)
        groups = module.scales.shape[0]
        return Scheme(f"awq int{module.bits}", module.bits, None if groups == 1 else module.in_features // groups)

    def stored_scheme(self, module: StoredModule, config: Mapping[str, Any]) -> Scheme | None:
        if not {"qweight", "scales"} <= module.shapes.keys():
            return None
        (rows, words), (groups, outputs) = module.shapes["qweight"], module.shapes["scales"]
        bits = 32 * words // outputs
        if module.dtypes["qweight"] != "I32" or rows % groups or bits != config.get("bits", config.get("w_bit", 4)):
            raise BackendError("its tensors do not have the shapes of AWQ's GEMM layout, the only one that glowq reads")
        return Scheme(f"awq int{bits}", bits, None if groups == 1 else rows // groups)

    def packed_bytes(self, module: Any) -> int:
        return super().packed_bytes(module) + module.scales.numel() * module.bits // 8

    @staticmethod
    def _check(module: Any) -> None:
        if getattr(module, "linear_mode", None) == "inference":
            raise RepackedWeightError(
                f"gptqmodel's {type(module).__name__} rewrote its weight at an earlier forward; it can no longer be "
                "read back exactly. Load the model again and call glowq before its first forward, or load it with "
                "AwqConfig(backend='torch_awq')."
            )
        groups = None if getattr(module, "scales", None) is None else module.scales.shape[0]
        packed = (module.in_features, module.out_features * module.bits // 32)
        if groups is None or tuple(module.qweight.shape) != packed:
            raise BackendError(
                f"gptqmodel's {type(module).__name__} does not keep AWQ's GEMM layout and cannot be read back exactly. "
                "Load the model with AwqConfig(backend='torch_awq')."
            )
