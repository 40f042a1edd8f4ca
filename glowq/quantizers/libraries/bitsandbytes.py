"""bitsandbytes: NF4 and FP4 with one scale per block, LLM.int8() with one scale per row."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import BackendError, RepackedWeightError
from ..base import Backend, FusedProduct, Scheme, StoredModule, Unavailable, changed
from ..registry import register

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_BYTES = {"BF16": 2, "F16": 2, "F32": 4}  # per element of bnb_4bit_quant_storage, if it is not one byte

_NOT_QUANTIZED = (
    "a {} holds a weight without its {}: it was never quantized, or it was replaced, dequantized or moved without it. "
    "Load the model again with from_pretrained, and call glowq before anything changes its weights. If its checkpoint "
    "lacks this module (a new head), name the module in llm_int8_skip_modules."
)


def _config_4bit(quant_type: str, double: bool) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype="bfloat16",
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
        "nf4": partial(_config_4bit, "nf4", False),
        "nf4-double": partial(_config_4bit, "nf4", True),
        "fp4": partial(_config_4bit, "fp4", False),
        "fp4-double": partial(_config_4bit, "fp4", True),
    }

    def matches(self, module: nn.Module) -> bool:
        bnb = sys.modules.get("bitsandbytes")
        return bnb is not None and isinstance(module, bnb.nn.Linear4bit)

    def prepare(self, module: Any, dtype: torch.dtype) -> None:
        import torch

        from ...utils.processor import float32_is_faster

        # On AVX512-BF16 CPUs, the first forward without gradients repacks the weight in place. After that,
        # dequantize_4bit and save_pretrained silently produce a different weight.
        module.support_avx512bf16_for_cpu = False
        # The stored config keeps the dtype that is fast on a GPU; a CPU without bfloat16 products computes in float32.
        if module.weight.is_cpu and float32_is_faster(module.compute_dtype):
            module.compute_dtype = torch.float32

    def release(self, module: Any) -> bool:
        from bitsandbytes.functional import has_avx512bf16

        if not module.weight.is_cpu:
            return False  # GPU kernels do not rewrite the weight
        module.support_avx512bf16_for_cpu = has_avx512bf16()
        return bool(module.support_avx512bf16_for_cpu)

    def may_differ(self, module: Any) -> bool:
        from ...utils.processor import has_avx512

        # Where a row ends inside of a block, bitsandbytes' AVX512 kernel takes the scale of another block.
        state = getattr(module.weight, "quant_state", None)
        odd = state is not None and module.in_features % state.blocksize != 0
        return (odd and module.weight.is_cpu and has_avx512()) or super().may_differ(module)

    def fused_product(self, module: Any) -> FusedProduct | None:
        from ..products.nf4 import Product

        library = sys.modules["bitsandbytes"].nn.Linear4bit
        return Product() if type(module).forward is library.forward else None

    def weight(self, module: Any) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(module.weight.data, self._state(module))

    def codes(self, module: Any) -> list[Tensor]:
        import torch

        self._state(module)
        return [module.weight.data.view(torch.uint8)]

    # A config of bitsandbytes is for both of its kinds of modules, and the registry finds this class first.

    def finer(self, config: Any) -> Unavailable:
        if config.load_in_8bit:
            return Unavailable("bitsandbytes' int8 has no groups, but a scale for each row")
        return Unavailable("transformers has no setting for the block of bitsandbytes, which is 64 values")

    def wider(self, config: Any) -> Any | Unavailable:
        if config.load_in_8bit:
            return Unavailable("8 bits are the most that bitsandbytes quantizes a weight to")
        return changed(_config_8bit(), llm_int8_skip_modules=config.llm_int8_skip_modules)

    def partner(self, config: Any) -> None:
        return None  # transformers quantizes a model to 4 bits or to 8, or leaves modules alone

    def mixed(self, config: Any, wide: Sequence[str], others: Sequence[str], dense: Sequence[str]) -> Any:
        return changed(config, llm_int8_skip_modules=[*(config.llm_int8_skip_modules or dense), *wide])

    def scales(self, module: Any) -> list[Tensor]:
        state = self._state(module)
        return [state.absmax, state.state2.absmax] if state.nested else [state.absmax]

    def offsets(self, module: Any) -> list[Tensor]:
        state = self._state(module)
        return [state.offset] if state.nested else []

    def scheme(self, module: Any) -> Scheme:
        state = self._state(module)
        return Scheme(state.quant_type, 4, state.blocksize, ("double quantization",) if state.nested else ())

    def stored_scheme(self, module: StoredModule, config: Mapping[str, Any]) -> Scheme | None:
        marks = [name for name in module.shapes if name.startswith("weight.quant_state.bitsandbytes__")]
        if not marks:
            return None
        values = 2 * prod(module.shapes["weight"]) * _BYTES.get(module.dtypes["weight"], 1)
        blocks = prod(module.shapes["weight.absmax"])
        # The last block may be incomplete, so round up: bitsandbytes' block sizes are powers of two.
        size = 1 << (-(-values // blocks) - 1).bit_length()
        nested = "weight.nested_absmax" in module.shapes
        return Scheme(marks[0].rpartition("__")[2], 4, size, ("double quantization",) if nested else ())

    @staticmethod
    def _state(module: Any) -> Any:
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            raise BackendError(_NOT_QUANTIZED.format("Linear4bit", "quant_state"))
        if getattr(state, "packing_format_for_cpu", False):
            raise RepackedWeightError(
                "a Linear4bit's weight was repacked in place by bitsandbytes' CPU kernel during an earlier forward, "
                "and can no longer be read back exactly. Load the model again and call glowq before its first forward."
            )
        return state


def _config_8bit() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


@register
class BitsAndBytes8Bit(Backend):
    """`bitsandbytes.nn.Linear8bitLt` with int8 weights."""

    name = "bitsandbytes-8bit"
    package = "bitsandbytes"
    extra = "bitsandbytes"
    tested = ">=0.48,<0.51"
    methods = ("bitsandbytes",)
    zero_scales = True
    presets: ClassVar = {"int8": _config_8bit}

    def matches(self, module: nn.Module) -> bool:
        bnb = sys.modules.get("bitsandbytes")
        return bnb is not None and isinstance(module, bnb.nn.Linear8bitLt)

    def weight(self, module: Any) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(module.weight.data, self._scales(module))

    def codes(self, module: Any) -> list[Tensor]:
        self._scales(module)
        return [module.weight.data]

    def scales(self, module: Any) -> list[Tensor]:
        return [self._scales(module)]

    def scheme(self, module: Any) -> Scheme:
        return Scheme("int8", 8, None)

    def rounds_inputs(self, module: Any) -> bool:
        return True

    def stored_scheme(self, module: StoredModule, config: Mapping[str, Any]) -> Scheme | None:
        return Scheme("int8", 8, None) if {"SCB", "weight"} <= module.shapes.keys() else None

    @staticmethod
    def _scales(module: Any) -> Tensor:
        # The first forward moves the scales from the weight to the module's state.
        scales = module.state.SCB if module.state.SCB is not None else getattr(module.weight, "SCB", None)
        if scales is None:
            raise BackendError(_NOT_QUANTIZED.format("Linear8bitLt", "SCB"))
        return scales
