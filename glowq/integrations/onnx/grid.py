"""A quantized weight as the grid behind it, (codes - zero points) * scales, told from the weight and its scales alone.

So every library's integers need one reader only: how it orders and packs its codes and zero points does not matter, for
codes and zero points that give the same weight are as good as its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BLOCKS", "Grid", "fit_grid", "is_rounding_of"]

BLOCKS = (16, 32, 64, 128, 256)  # values that share a scale in ONNX Runtime's operators
_ROUNDED_TO = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Grid:
    """Codes, scales and zero points of a weight Q, cut into blocks of a size that the operators take.

    Attributes:
        bits: of a code.
        block: values of one row that share a scale and a zero point.
        codes: uint8, below 2^bits, shape (out_features, in_features).
        scales: float32, shape (out_features, ceil(in_features / block)).
        zeros: zero points, uint8 where they are whole numbers, else float32, shape of the scales; None where each is
            the middle code 2^(bits - 1).
    """

    bits: int
    block: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


def fit_grid(weight: Tensor, scales: Tensor, bits: int, group_size: int | None) -> Grid | None:
    """The grid whose values, rounded as the library rounds them, are the very values of `weight`.

    Whole zero points are tried first and give the weight exactly. Zero points between the codes (HQQ, quanto) are the
    ones nearest to the weight: within its own rounding, for a weight in bfloat16 does not tell them any closer.

    Args:
        weight: what the library multiplies by, float32, shape (out_features, in_features).
        scales: one a group, by row or by column as the library keeps them, any shape; or a single one.
        bits: of a code.
        group_size: values of a row that share a scale, a multiple of 16; None: the whole row.

    Returns:
        None where there is no such grid.
    """
    outputs, inputs = weight.shape
    size = group_size or inputs
    groups = math.ceil(inputs / size)
    if scales.numel() == 1:
        scales = scales.reshape(1, 1).expand(outputs, 1)
    if scales.numel() != outputs * groups:
        return None
    for by_row in (scales.reshape(outputs, groups), scales.reshape(groups, outputs).T):
        steps = F.pad(weight, (0, groups * size - inputs), value=math.nan).unflatten(1, (groups, size)).double()
        wide = by_row.double().unsqueeze(-1)
        steps = torch.where(wide == 0, torch.where(steps.isnan(), math.nan, 0.0), steps / wide)
        found = _whole(weight, steps, wide, bits) or _between(weight, steps, wide, bits)
        if found is not None:
            return _in_blocks(*found, by_row.float(), bits, size, inputs)
    return None


def is_rounding_of(weight: Tensor, exact: Tensor) -> bool:
    """Whether `weight` is `exact` (both float32) rounded to float32, float16 or bfloat16."""
    return any(torch.equal(exact.to(dtype).float(), weight) for dtype in _ROUNDED_TO)


def _whole(weight: Tensor, steps: Tensor, wide: Tensor, bits: int) -> tuple[Tensor, Tensor | None] | None:
    """Codes and whole zero points, if steps (out_features, groups, size; NaN is padding) are whole numbers."""
    whole = steps.round()
    if not is_rounding_of(weight, (whole * wide).flatten(1)[:, : weight.shape[1]].float()):
        return None
    lowest, highest = _range(whole)
    middle = 2 ** (bits - 1)
    if bool((lowest >= -middle).all()) and bool((highest < middle).all()):
        return (whole + middle).nan_to_num(0).to(torch.uint8), None
    zeros = (-lowest).clamp(0, 2**bits - 1)
    codes = whole + zeros.unsqueeze(-1)
    lowest, highest = _range(codes)
    if bool((lowest < 0).any()) or bool((highest >= 2**bits).any()):
        return None
    return codes.nan_to_num(0).to(torch.uint8), zeros.to(torch.uint8)


def _between(weight: Tensor, steps: Tensor, wide: Tensor, bits: int) -> tuple[Tensor, Tensor] | None:
    """Codes and zero points that are no whole numbers."""
    turn = 2 * math.pi * steps
    offset = torch.atan2(turn.sin().nanmean(-1), turn.cos().nanmean(-1)) / (2 * math.pi)  # of a whole number
    codes = (steps - offset.unsqueeze(-1)).round()
    lowest, _ = _range(codes)
    codes = codes - lowest.unsqueeze(-1)
    if not bool((_range(codes)[1] < 2**bits).all()):
        return None
    zeros = (codes - steps).nanmean(-1).float()
    exact = ((codes - zeros.double().unsqueeze(-1)) * wide).flatten(1)[:, : weight.shape[1]]
    largest = (steps.abs() * wide.abs()).nan_to_num(0).amax(-1, keepdim=True).expand_as(steps)
    # Libraries round the difference and the product, each to its dtype.
    bound = 2 * torch.finfo(_dtype_of(weight)).eps * largest.flatten(1)[:, : weight.shape[1]]
    if bool(((exact - weight).abs() > bound).any()):
        return None
    return codes.nan_to_num(0).to(torch.uint8), zeros


def _in_blocks(codes: Tensor, zeros: Tensor | None, scales: Tensor, bits: int, size: int, inputs: int) -> Grid:
    """The grid of groups as one of blocks: each group becomes the fewest blocks that the operators take."""
    block = min(size & -size, BLOCKS[-1])
    block = block if block in BLOCKS else 32  # a whole row of any length: its last block may be a part of one
    group = torch.arange(0, inputs, block) // size
    zeros = None if zeros is None else zeros[:, group].contiguous()
    return Grid(bits, block, codes.flatten(1)[:, :inputs].contiguous(), scales[:, group].contiguous(), zeros)


def _range(steps: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest of each group, NaN left out."""
    return steps.nan_to_num(math.inf).amin(-1), steps.nan_to_num(-math.inf).amax(-1)


def _dtype_of(weight: Tensor) -> torch.dtype:
    """The coarsest dtype that holds every value of a float32 tensor."""
    return next(dtype for dtype in reversed(_ROUNDED_TO) if torch.equal(weight.to(dtype).float(), weight))
