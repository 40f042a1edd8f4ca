"""Every function of the package in plain torch, with the same signature, errors, dtypes and rounding, on any device.

The tests compare the kernels with these functions. They also run where the kernels cannot. They dequantize the whole
weight first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_gptq, check_left_add, check_nf4, check_right

__all__ = ["gptq_linear", "left_add_", "nf4_linear", "right"]


def right(x: Tensor, right: Tensor, scale: Tensor | None = None, multipliers: Tensor | None = None) -> Tensor:
    """See `glowq_kernels.right`."""
    check_right(x, right, scale, multipliers)
    dtype = right.dtype if right.dtype.is_floating_point else x.dtype
    if multipliers is not None:
        right = _numbers(right, multipliers).flatten(1)[:, : x.shape[-1]]
    return (x.float() @ _factor(right, scale).T).to(dtype)


def left_add_(
    output: Tensor, product: Tensor, left: Tensor, scale: Tensor | None = None, multipliers: Tensor | None = None
) -> None:
    """See `glowq_kernels.left_add_`."""
    check_left_add(output, product, left, scale, multipliers)
    # Sums in float64 do not depend on the order of the additions once they are rounded: a slice of the outputs then
    # gets the same values as all outputs together.
    output.copy_(output.double() + product.double() @ _left(left, scale, multipliers).double().T)


def gptq_linear(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    *,
    bits: int = 4,
    group_size: int,
    g_idx: Tensor | None = None,
    zero_offset: int = 0,
    bias: Tensor | None = None,
    product: Tensor | None = None,
    left: Tensor | None = None,
    left_scale: Tensor | None = None,
    left_multipliers: Tensor | None = None,
) -> Tensor:
    """See `glowq_kernels.gptq_linear`."""
    check_gptq(x, qweight, qzeros, scales, bits, group_size, g_idx, bias, product, left, left_scale, left_multipliers)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=x.device)
    codes = ((qweight[:, None, :] >> shifts[:, None]) & 0xF).flatten(0, 1)
    zeros = ((qzeros[:, :, None] >> shifts) & 0xF).flatten(1) + zero_offset
    if g_idx is None:
        channels = torch.arange(x.shape[-1], device=x.device)
        g_idx = channels // (x.shape[-1] if group_size == -1 else group_size)
    groups = g_idx.long()
    weight = (codes - zeros[groups]).float() * scales.float()[groups]
    return _linear(x, weight.T, bias, product, left, left_scale, left_multipliers)


def nf4_linear(
    x: Tensor,
    qweight: Tensor,
    absmax: Tensor,
    code: Tensor,
    *,
    blocksize: int,
    out_features: int,
    bias: Tensor | None = None,
    product: Tensor | None = None,
    left: Tensor | None = None,
    left_scale: Tensor | None = None,
    left_multipliers: Tensor | None = None,
) -> Tensor:
    """See `glowq_kernels.nf4_linear`."""
    check_nf4(x, qweight, absmax, code, blocksize, out_features, bias, product, left, left_scale, left_multipliers)
    packed = qweight.reshape(-1)
    values = code[torch.stack((packed >> 4, packed & 0xF), dim=1).flatten().long()]
    values *= absmax.repeat_interleave(blocksize)[: values.numel()]
    return _linear(x, values.view(out_features, -1), bias, product, left, left_scale, left_multipliers)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    product: Tensor | None,
    left: Tensor | None,
    left_scale: Tensor | None,
    left_multipliers: Tensor | None,
) -> Tensor:
    output = x.float() @ weight.T
    if bias is not None:
        output += bias.float()
    if product is not None and left is not None:
        output += product.float() @ _left(left, left_scale, left_multipliers).T
    return output.to(x.dtype)


def _factor(factor: Tensor, scale: Tensor | None) -> Tensor:
    return factor.float() if scale is None else factor.float() * scale[:, None]


def _left(left: Tensor, scale: Tensor | None, multipliers: Tensor | None) -> Tensor:
    if multipliers is None or scale is None:
        return _factor(left, scale)
    return _factor(_numbers(left, multipliers).transpose(1, 2).flatten(0, 1)[: len(scale)], scale)


def _numbers(codes: Tensor, multipliers: Tensor) -> Tensor:
    """The numbers of blocks, float32, shape (..., 32); see `triton_blocks`."""
    words = codes.int()
    if codes.shape[-1] == 16:
        found = torch.cat([(words >> shift) & 15 for shift in (0, 4)], -1) - 8
    else:
        low = torch.cat([(words[..., :8] >> shift) & 3 for shift in (0, 2, 4, 6)], -1)
        high = torch.cat([(words[..., 8:] >> shift) & 1 for shift in range(8)], -1)
        found = low + 4 * high - 4
    return found.float() * multipliers.float()[..., None]
