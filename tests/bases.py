"""The test matrix: one row per base quantizer, with the library's own way to read its weight back."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

MODEL = Path(__file__).parents[1] / "examples" / "stdlib-llama"


@dataclass(frozen=True)
class Base:
    """One `--base` name.

    Attributes:
        name: as `--base` takes it.
        package: import name of the library.
        extra: pip extra that installs it.
        bits: nominal bits a weight.
        kernel_error: largest relative error of the library's kernel (bfloat16 or float16 inside) on float32 inputs.
        dequantize: the library's own read-back of one module.
    """

    name: str
    package: str
    extra: str
    bits: int
    kernel_error: float
    dequantize: Callable[[nn.Module], Tensor]

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    def load(self, dtype: torch.dtype = torch.float32, folder: str | Path = MODEL, **options: Any) -> Any:
        """The bundled model quantized by this base, untouched by glowq."""
        from transformers import AutoModelForCausalLM

        from glowq.backends import base_config

        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=base_config(self.name), dtype=dtype, **options
        )


def _four_bit(module: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def _eight_bit(module: Any) -> Tensor:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(module.weight, module.state)


def _torchao(module: Any) -> Tensor:
    return module.weight.dequantize()


BASES = [
    Base("nf4", "bitsandbytes", "bitsandbytes", 4, 5e-3, _four_bit),
    Base("nf4-double", "bitsandbytes", "bitsandbytes", 4, 5e-3, _four_bit),
    Base("fp4", "bitsandbytes", "bitsandbytes", 4, 5e-3, _four_bit),
    Base("fp4-double", "bitsandbytes", "bitsandbytes", 4, 5e-3, _four_bit),
    Base("int8", "bitsandbytes", "bitsandbytes", 8, 5e-3, _eight_bit),
    Base("torchao-int8", "torchao", "torchao", 8, 1e-6, _torchao),
    Base("torchao-int4", "torchao", "torchao", 4, 1e-6, _torchao),
    Base("torchao-int3", "torchao", "torchao", 3, 1e-6, _torchao),
    Base("torchao-int2", "torchao", "torchao", 2, 1e-6, _torchao),
]


def rows(*names: str) -> list[Any]:
    """The named rows (all of them without names) as pytest parameters; one whose library is absent is skipped."""
    chosen = [base for base in BASES if not names or base.name in names]
    return [
        pytest.param(base, id=base.name, marks=pytest.mark.skipif(not base.installed, reason=f"needs {base.package}"))
        for base in chosen
    ]
