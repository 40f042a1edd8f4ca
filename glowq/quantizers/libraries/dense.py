"""Plain float weights that hold quantized values, for example of GGUF, float8 or mxfp4 files, dequantized on load.

Such a module looks like a module that was never quantized. This backend therefore matches a module only after
`glowq.quantizers.loading.dense.mark_dense` has marked it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..base import DENSE_MARK, Backend, Scheme
from ..registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn


@register
class Dense(Backend):
    """`nn.Linear` and transformers' `Conv1D` (GPT-2) with a plain float weight that `mark_dense` has marked."""

    name = "dense"
    package = "torch"
    extra = ""
    tested = ""
    methods = ("dense",)

    def matches(self, module: nn.Module) -> bool:
        return DENSE_MARK in module.__dict__

    def weight(self, module: Any) -> Tensor:
        from transformers.pytorch_utils import Conv1D

        return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data

    def codes(self, module: Any) -> list[Tensor]:
        import torch

        weight = module.weight.data.contiguous()
        return [weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize])]

    def scales(self, module: Any) -> list[Tensor]:
        return []

    def scheme(self, module: Any) -> Scheme:
        return Scheme(f"dense {str(module.weight.dtype).removeprefix('torch.')}", module.weight.itemsize * 8, 0)

    def features(self, module: Any) -> tuple[int, int]:
        from transformers.pytorch_utils import Conv1D

        rows, columns = module.weight.shape
        return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)

    def quantizers(self) -> dict[str, type]:
        from ..loading.dense import DenseHfQuantizer

        return {"dense": DenseHfQuantizer}
