"""Small valid arguments of each function, on the CPU. The tests of errors change one argument at a time."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["VALID"]


def right_arguments() -> dict[str, Any]:
    return {"x": torch.ones(2, 16), "right": torch.ones(3, 16), "scale": None}


def left_arguments() -> dict[str, Any]:
    return {"output": torch.ones(2, 8), "product": torch.ones(2, 3), "left": torch.ones(8, 3), "scale": None}


def gptq_arguments() -> dict[str, Any]:
    return {
        "x": torch.ones(2, 64),
        "qweight": torch.zeros(8, 16, dtype=torch.int32),
        "qzeros": torch.zeros(2, 2, dtype=torch.int32),
        "scales": torch.ones(2, 16),
        "group_size": 32,
    }


def nf4_arguments() -> dict[str, Any]:
    return {
        "x": torch.ones(2, 64),
        "qweight": torch.zeros(64 * 8 // 2, 1, dtype=torch.uint8),
        "absmax": torch.ones(8),
        "code": torch.ones(16),
        "blocksize": 64,
        "out_features": 8,
    }


VALID = {
    "right": right_arguments,
    "left_add_": left_arguments,
    "gptq_linear": gptq_arguments,
    "nf4_linear": nf4_arguments,
}
