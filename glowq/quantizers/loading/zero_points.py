"""Load compressed-tensors' checkpoints with asymmetric weights, whose zero points are packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

__all__ = ["PackedZeroPointsHfQuantizer"]


class PackedZeroPointsHfQuantizer(CompressedTensorsHfQuantizer):
    """transformers' quantizer for compressed-tensors, with a fix for packed zero points.

    compressed-tensors 0.18 to 0.20 prepares modules for zero points that are not packed. But the files hold zero points
    packed like the codes, so from_pretrained stops with a size mismatch. This class prepares the modules for packed
    zero points. It does nothing if the layout is already right.
    """

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, **kwargs)  # type: ignore[no-untyped-call]
        for module in model.modules():
            zeros = module._parameters.get("weight_zero_point")
            if zeros is not None and "weight_packed" in module._parameters and zeros.dtype != torch.int32:
                scheme: Any = module.quantization_scheme
                rows = -(-zeros.shape[0] * scheme.weights.num_bits // 32)
                packed = zeros.new_empty((rows, *zeros.shape[1:]), dtype=torch.int32)
                module.weight_zero_point = nn.Parameter(packed, requires_grad=False)
