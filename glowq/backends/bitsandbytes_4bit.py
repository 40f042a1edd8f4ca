"""bitsandbytes NF4 and FP4 (`Linear4bit`), with and without double quantization."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import BackendError, RepackedWeightError
from . import Backend, Scheme, StoredModule, register

_BYTES = {"BF16": 2, "F16": 2, "F32": 4}  # of bnb_4bit_quant_storage, where it is not a byte


def _config(quant_type: str, double: bool) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


@register
class BitsAndBytes4Bit(Backend):
    """`bitsandbytes.nn.Linear4bit`."""

    name = "bitsandbytes-4bit"
    package = "bitsandbytes"
    extra = "bitsandbytes"
    tested = ">=0.48,<0.51"
    methods = ("bitsandbytes",)
    zero_scales = True  # a block of zeros has absmax zero
    presets: ClassVar = {
        "nf4": partial(_config, "nf4", False),
        "nf4-double": partial(_config, "nf4", True),
        "fp4": partial(_config, "fp4", False),
        "fp4-double": partial(_config, "fp4", True),
    }

    def matches(self, module: nn.Module) -> bool:
        bnb = sys.modules.get("bitsandbytes")
        return bnb is not None and isinstance(module, bnb.nn.Linear4bit)

    def prepare(self, module: Any, dtype: torch.dtype) -> None:
        # On AVX512-BF16 CPUs the first forward without gradients repacks the weight in place; from then on
        # dequantize_4bit and save_pretrained silently produce another weight.
        module.support_avx512bf16_for_cpu = False

    def release(self, module: Any) -> bool:
        from bitsandbytes.functional import has_avx512bf16

        module.support_avx512bf16_for_cpu = has_avx512bf16()
        return bool(module.support_avx512bf16_for_cpu)

    def weight(self, module: Any) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(module.weight.data, self._state(module))

    def codes(self, module: Any) -> list[Tensor]:
        self._state(module)
        return [module.weight.data.view(torch.uint8)]

    def scales(self, module: Any) -> list[Tensor]:
        state = self._state(module)
        return [state.absmax, state.state2.absmax] if state.nested else [state.absmax]

    def scheme(self, module: Any) -> Scheme:
        state = self._state(module)
        return Scheme(state.quant_type, 4, state.blocksize, ("double quantization",) if state.nested else ())

    def stored_scheme(self, module: StoredModule, config: Mapping[str, Any]) -> Scheme | None:
        marks = [name for name in module.shapes if name.startswith("weight.quant_state.bitsandbytes__")]
        if not marks:
            return None
        values = 2 * prod(module.shapes["weight"]) * _BYTES.get(module.dtypes["weight"], 1)
        blocks = prod(module.shapes["weight.absmax"])
        # The last block may be a part of one; bitsandbytes' block sizes are powers of two.
        size = 1 << (-(-values // blocks) - 1).bit_length()
        nested = "weight.nested_absmax" in module.shapes
        return Scheme(marks[0].rpartition("__")[2], 4, size, ("double quantization",) if nested else ())

    @staticmethod
    def _state(module: Any) -> Any:
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            raise BackendError("a Linear4bit holds a weight that was never quantized; load it with from_pretrained.")
        if getattr(state, "packing_format_for_cpu", False):
            raise RepackedWeightError(
                "a Linear4bit's weight was repacked in place by bitsandbytes' CPU kernel during an earlier forward, "
                "and can no longer be read back exactly. Load the model again and call glowq before its first forward."
            )
        return state
