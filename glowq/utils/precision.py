"""How torch computes products of bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["bfloat16_products"]


@contextmanager
def bfloat16_products(dtype: torch.dtype) -> Iterator[None]:
    """Let the CPU multiply in bfloat16 and add in float32 where the activations are bfloat16 anyway.

    Products of bfloat16 numbers are exact in float32. Processors with bfloat16 instructions are faster that way.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    before = getattr(matmul, "fp32_precision", None)
    if dtype != torch.bfloat16 or before is None:
        yield
        return
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
