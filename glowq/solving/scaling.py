"""Powers of two that bring tensors near 1, so that products in float32 neither overflow nor become zero.

Multiplying by a power of two rounds nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .moments import LowRankMoment, OutputMoment

__all__ = ["near_one", "power_of", "scaled"]

_FAR = 2.0**32  # float32 holds the squares of values up to here, summed over 2^63 tokens; and those of 1 / _FAR


def power_of(name: str, tensor: OutputMoment | None) -> float:
    """The power of two that brings a tensor's largest entry near 1: 0 for a zero tensor, 1 for an absent one.

    Raises:
        NonFiniteError: the tensor holds NaN or Inf; the message says its name.
    """
    if tensor is None:
        return 1.0
    if isinstance(tensor, LowRankMoment):  # the largest entry of a positive semi-definite matrix is on its diagonal
        tensor = tensor.full_diagonal()
    low, high = (float(bound) for bound in tensor.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NonFiniteError(f"{name} {tuple(tensor.shape)} must be finite; found NaN or Inf. Check what measured it.")
    return math.ldexp(1.0, -math.frexp(max(-low, high))[1]) if low or high else 0.0


def scaled(tensor: Tensor, power: float, dtype: torch.dtype) -> Tensor:
    """power * tensor in another dtype, multiplied before it is converted: float32 has neither 1e60 nor 1e-60."""
    found = torch.empty_like(tensor, dtype=dtype)
    for target, rows in zip(found.split(1024), tensor.split(1024), strict=True):
        target.copy_(rows * power)
    return found


def near_one(rows: Tensor) -> tuple[Tensor, float]:
    """Return (power * rows, power), with a power of two for which the squares of the rows are float32 numbers.

    The power is 1, and the rows are returned as they are, where their squares are such numbers already, and where the
    rows are empty, zero or not finite.

    Args:
        rows: float32 tensor of any shape.
    """
    if rows.numel() == 0:
        return rows, 1.0
    low, high = (float(bound) for bound in rows.aminmax())
    largest = max(-low, high)
    if not math.isfinite(low + high) or largest == 0 or 1 / _FAR <= largest <= _FAR:
        return rows, 1.0
    power = math.ldexp(1.0, -math.frexp(largest)[1])
    return rows * power, power
