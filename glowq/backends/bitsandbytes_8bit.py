"""bitsandbytes LLM.int8() (`Linear8bitLt`)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import BackendError
from . import Backend, Scheme, StoredModule, register


def _config() -> Any:
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
    presets: ClassVar = {"int8": _config}

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
        # The scales move from the weight to the module's state at its first forward.
        scales = module.state.SCB if module.state.SCB is not None else getattr(module.weight, "SCB", None)
        if scales is None:
            raise BackendError("a Linear8bitLt holds a weight that was never quantized; load it with from_pretrained.")
        return scales
