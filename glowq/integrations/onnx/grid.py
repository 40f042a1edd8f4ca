"""Find the grid of a quantized weight, (codes - zero points) * scales, from the weight and its scales alone.

So one function works for the integers of every library, in whatever order and packing the library stores them. The
codes and zero points that are found may differ from the library's own, but they give the same weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BLOCKS", "Grid", "fit_grid", "is_rounding_of"]

BLOCKS = (16, 32, 64, 128, 256)  # block sizes of ONNX Runtime's operators: values that share a scale
_ROUNDED_TO = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Grid:
    """Codes, scales and zero points of a weight Q, in blocks of a size that the operators support.

    Attributes:
        bits: bits per code.
        block: block size: the number of values of one row that share a scale and a zero point.
        codes: uint8, below 2^bits, shape (out_features, in_features).
        scales: float32, shape (out_features, ceil(in_features / block)).
        zeros: zero points, shape of `scales`, uint8 if they are whole numbers, otherwise float32; None if every zero
            point is the middle code 2^(bits - 1).
    """

    bits: int
    block: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


def fit_grid(weight: Tensor, scales: Tensor, bits: int, group_size: int | None) -> Grid | None:
    """Find the grid whose values, rounded as the library rounds them, equal `weight`.

    Zero points that are whole numbers are tried first; with them the grid gives the weight exactly. Fractional zero
    points (HQQ, quanto) are estimated from the weight, and the grid matches the weight up to the weight's own rounding:
    a weight in bfloat16 does not determine them more precisely.

    Args:
        weight: the weight that the library multiplies by, float32, shape (out_features, in_features).
        scales: one scale per group, in the order of rows or of columns, any shape; or a single scale.
        bits: bits per code.
        group_size: number of values of a row that share a scale, a multiple of 16; None for the whole row.

    Returns:
        The grid, or None if there is none.
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
        found = _with_whole_zeros(weight, steps, wide, bits) or _with_fractional_zeros(weight, steps, wide, bits)
        if found is not None:
            return _in_blocks(*found, by_row.float(), bits, size, inputs)
    return None


def is_rounding_of(weight: Tensor, exact: Tensor) -> bool:
    """Whether `weight` is `exact` (both float32) rounded to float32, float16 or bfloat16."""
    return any(torch.equal(exact.to(dtype).float(), weight) for dtype in _ROUNDED_TO)


def _with_whole_zeros(weight: Tensor, steps: Tensor, wide: Tensor, bits: int) -> tuple[Tensor, Tensor | None] | None:
    """Codes and zero points that are whole numbers; None if `steps` are not whole numbers.

    Args:
        weight: see `fit_grid`.
        steps: weight divided by scale, float64, shape (out_features, groups, size), NaN for padding.
        wide: scales, float64, shape (out_features, groups, 1).
        bits: bits per code.
    """
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


def _with_fractional_zeros(weight: Tensor, steps: Tensor, wide: Tensor, bits: int) -> tuple[Tensor, Tensor] | None:
    """Codes and fractional zero points, or None if no such grid gives the weight; see `_with_whole_zeros`."""
    turn = 2 * math.pi * steps
    offset = torch.atan2(turn.sin().nanmean(-1), turn.cos().nanmean(-1)) / (2 * math.pi)  # mean fractional part
    codes = (steps - offset.unsqueeze(-1)).round()
    lowest, _ = _range(codes)
    codes = codes - lowest.unsqueeze(-1)
    if not bool((_range(codes)[1] < 2**bits).all()):
        return None
    zeros = (codes - steps).nanmean(-1).float()
    exact = ((codes - zeros.double().unsqueeze(-1)) * wide).flatten(1)[:, : weight.shape[1]]
    largest = (steps.abs() * wide.abs()).nan_to_num(0).amax(-1, keepdim=True).expand_as(steps)
    # Libraries round twice: the difference of code and zero point, and its product with the scale.
    bound = 2 * torch.finfo(_dtype_of(weight)).eps * largest.flatten(1)[:, : weight.shape[1]]
    if bool(((exact - weight).abs() > bound).any()):
        return None
    return codes.nan_to_num(0).to(torch.uint8), zeros


def _in_blocks(codes: Tensor, zeros: Tensor | None, scales: Tensor, bits: int, size: int, inputs: int) -> Grid:
    """Split groups into blocks, as few blocks per group as the operators' block sizes allow."""
    block = min(size & -size, BLOCKS[-1])
    block = block if block in BLOCKS else 32  # the group is a whole row of any length: its last block may be shorter
    group = torch.arange(0, inputs, block) // size
    zeros = None if zeros is None else zeros[:, group].contiguous()
    return Grid(bits, block, codes.flatten(1)[:, :inputs].contiguous(), scales[:, group].contiguous(), zeros)


def _range(steps: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group, NaN ignored."""
    return steps.nan_to_num(math.inf).amin(-1), steps.nan_to_num(-math.inf).amax(-1)


def _dtype_of(weight: Tensor) -> torch.dtype:
    """The coarsest dtype that holds every value of a float32 tensor."""
    return next(dtype for dtype in reversed(_ROUNDED_TO) if torch.equal(weight.to(dtype).float(), weight))
