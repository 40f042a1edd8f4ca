"""Reference results of the kernels in float64, and bounds on the error of the kernels.

This module shares no code with the package: it packs and unpacks weights by its own code.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24}  # bits of the significand
_BORDER = 64


def surrounded(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copy `tensor` into a larger one. Return the contiguous copy and the two regions around it.

    The regions are filled with NaN, or with the largest integer of an integer dtype.
    """
    poison = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    whole = torch.full((tensor.numel() + 2 * _BORDER,), poison, dtype=tensor.dtype, device=tensor.device)
    inner = whole[_BORDER:-_BORDER]
    inner.copy_(tensor.reshape(-1))
    return inner.view(tensor.shape), whole[:_BORDER], whole[-_BORDER:]


def scattered(tensor: Tensor) -> Tensor:
    """Return `tensor` as a view of a larger tensor of NaN; no stride of the view is 1."""
    shape = [size + 2 for size in tensor.shape[:-1]] + [2 * tensor.shape[-1] + 5]
    whole = torch.full(shape, torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = whole[tuple(slice(1, 1 + size) for size in tensor.shape[:-1])][..., 3 : 3 + 2 * tensor.shape[-1] : 2]
    view.copy_(tensor)
    return view


def rounding(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding to `dtype` on the device that runs the kernels."""
    # A GPU rounds to nearest. Triton's interpreter truncates to bfloat16, with twice the error.
    cut = dtype is torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    return 2.0 ** -(_BITS[dtype] - cut)


def assert_close(actual: Tensor, expected: Tensor, magnitude: Tensor, terms: int, *, weights: float = 0.0) -> None:
    """Assert that `actual` is a float32 sum of `terms` terms, rounded once to its dtype.

    Args:
        actual: result to check.
        expected: exact result, float64, same shape.
        magnitude: sum of the absolute values of the terms, same shape. A float32 sum of n terms, in any order, has an
            error of at most n 2^-24 times this sum.
        terms: n; the bound adds a few terms for the multiplications.
        weights: relative error of each term before the sum.
    """
    assert actual.shape == expected.shape
    smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    sums = ((terms + 8) * 2.0**-24 + weights) * magnitude
    bound = sums + rounding(actual.dtype) * (expected.abs() + sums) + smallest
    error = (actual.double().cpu() - expected).abs()
    assert (error <= bound).all(), f"off by {float((error / bound).max()):.2f} times the bound"


def assert_linear(
    actual: Tensor,
    x: Tensor,
    weight: Tensor,
    magnitude: Tensor,
    *,
    bias: Tensor | None = None,
    product: Tensor | None = None,
    left: Tensor | None = None,
    left_scale: Tensor | None = None,
    weights: float = 0.0,
) -> None:
    """Assert that `actual` is x weight + bias + product left^T, in the dtype of x.

    Args:
        weight: shape (d, o), float64.
        magnitude: sum of the absolute values from which each entry of `weight` was computed, shape (d, o).
        weights: relative error of the entries of `weight`.
    """
    assert actual.dtype == x.dtype
    assert actual.is_contiguous()
    plain = x.double().cpu()
    expected, terms, size = plain @ weight, plain.shape[-1], plain.abs() @ magnitude
    if bias is not None:
        expected, size = expected + bias.double().cpu(), size + bias.double().cpu().abs()
    if product is not None and left is not None:
        entries, factor = product.double().cpu(), dense(left, left_scale)
        expected, size = expected + entries @ factor.T, size + entries.abs() @ factor.abs().T
        terms += left.shape[1]
    assert_close(actual, expected, size, terms, weights=weights)


def correction(
    shape: tuple[int, ...], outputs: int, rank: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor | None]:
    """Random arguments product, left and left_scale of a quantized linear function, for inputs of this shape."""
    left, scale = random_factor(outputs, rank, dtype, device)
    entries = torch.float32 if dtype is torch.int8 else dtype
    product = torch.randn(*shape[:-1], rank).to(device, entries)
    return {"product": surrounded(product)[0], "left": surrounded(left)[0], "left_scale": scale}


def dense(factor: Tensor, scale: Tensor | None) -> Tensor:
    """The values of a factor in float64, with its scale applied."""
    factor = factor.double().cpu()
    return factor if scale is None else factor * scale.double().cpu()[:, None]


def random_factor(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """A random factor and, if it is int8, its scale."""
    if dtype is torch.int8:
        codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        return codes.to(device), (torch.rand(rows) / 64 + 1e-3).to(device)
    return torch.randn(rows, columns).to(device, dtype), None


def random_blocks(ranks: int, width: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random numbers of each rank in blocks of 32, packed one by one.

    Returns:
        The codes, uint8, shape (ranks, blocks, 4 * bits), the multipliers, int8, shape (ranks, blocks), and the
        numbers, shape (ranks, width), float64.
    """
    blocks = -(-width // 32)
    values = torch.randint(0, 2**bits, (ranks, blocks, 32))
    multipliers = torch.randint(-15, 16, (ranks, blocks))
    codes = torch.zeros(ranks, blocks, 4 * bits, dtype=torch.int64)
    for place in range(32):
        value = values[..., place]
        if bits == 4:
            codes[..., place % 16] += value << 4 * (place // 16)
        else:
            codes[..., place % 8] += (value & 3) << 2 * (place // 8)
            codes[..., 8 + place % 4] += (value >> 2) << place // 4
    numbers = (values - 2 ** (bits - 1)) * multipliers[..., None]
    held = surrounded(codes.to(torch.uint8).to(device))[0], surrounded(multipliers.to(torch.int8).to(device))[0]
    return *held, numbers.flatten(1)[:, :width].double()


@dataclass
class GPTQWeight:
    """A random weight in GPTQ's layout, on the device, and in float64.

    Attributes:
        arguments: arguments of `gptq_linear`.
        weight: shape (d, o), float64.
        magnitude: (code + zero point) * scale, shape (d, o): the size of the numbers that are summed for an output.
    """

    arguments: dict[str, Any]
    weight: Tensor
    magnitude: Tensor


def random_gptq(
    inputs: int,
    outputs: int,
    group_size: int,
    device: torch.device,
    *,
    zero_offset: int = 0,
    order: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> GPTQWeight:
    """Return a random weight in GPTQ's layout; with `order`, each channel belongs to a random group."""
    size = inputs if group_size == -1 else group_size
    groups = -(-inputs // size)
    codes = torch.randint(0, 16, (inputs, outputs))
    zeros = torch.randint(0, 16, (groups, outputs))
    scales = (torch.rand(groups, outputs) + 0.1).to(scale_dtype)
    index = torch.randint(0, groups, (inputs,)) if order else torch.arange(inputs) // size
    total_zeros = zeros + zero_offset
    arguments = {
        "qweight": _packed(codes.T).T,
        "qzeros": _packed(zeros),
        "scales": scales,
        "g_idx": index.int() if order else None,
    }
    moved = {
        name: None if tensor is None else surrounded(tensor.contiguous().to(device))[0]
        for name, tensor in arguments.items()
    }
    wide = scales.double()[index]
    return GPTQWeight(
        {**moved, "group_size": group_size, "zero_offset": zero_offset},
        (codes - total_zeros[index]).double() * wide,
        (codes + total_zeros[index]).double() * wide,
    )


def _packed(codes: Tensor) -> Tensor:
    """Pack each eight codes of the last dimension into an int32 word, the first code in the lowest bits."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for place in range(8):
        words += codes[:, place::8] * 16**place
    return torch.where(words >= 2**31, words - 2**32, words).int()


def random_nf4(inputs: int, outputs: int, blocksize: int, device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Return arguments of `nf4_linear` for a random weight and a random code, and the weight (o, d) in float64."""
    count = inputs * outputs
    code = torch.randn(16)
    codes = torch.randint(0, 16, (count,))
    absmax = torch.rand(-(-count // blocksize)) + 0.1
    packed = (codes[0::2] * 16 + codes[1::2]).to(torch.uint8)[:, None]
    weight = code.double()[codes] * absmax.double()[torch.arange(count) // blocksize]
    tensors = {"qweight": packed, "absmax": absmax, "code": code}
    arguments = {name: surrounded(tensor.to(device))[0] for name, tensor in tensors.items()}
    return {**arguments, "blocksize": blocksize, "out_features": outputs}, weight.view(outputs, inputs)


def packed_by_gptqmodel(
    codes: Tensor,
    zeros: Tensor,
    scales: Tensor,
    groups: Tensor,
    *,
    bias: bool,
    bits: int = 4,
    group_size: int,
) -> Any:
    """Return gptqmodel's layer with the weight (codes - zeros) * scales, packed by the library.

    Args:
        codes: shape (o, d), int64, each below 2 ** bits.
        zeros: zero point of each group, shape (o, groups), int64.
        scales: shape (o, groups), float32.
        groups: group of each input channel, shape (d,), int64; for act-order, the groups are not sorted.
        bias: whether the layer has a random bias.
    """
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    outputs, inputs = codes.shape
    linear = torch.nn.Linear(inputs, outputs, bias).requires_grad_(False)
    linear.weight.data = (codes - zeros[:, groups]) * scales[:, groups]
    layer = TorchLinear(
        bits=bits,
        group_size=group_size,
        desc_act=bool((groups.diff() < 0).any()),
        sym=False,
        in_features=inputs,
        out_features=outputs,
        bias=bias,
        pack_dtype=torch.int32,
        register_buffers=False,
    )
    layer.pack_original(linear, scales, zeros.float(), groups.int())
    return layer
