"""The products of a correction with matrices: in plain torch, and faster for a few tokens on some devices.

A factor is a float matrix, or an int8 matrix with one scale per row, see `glowq.runtime.operators`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..factors.integers import Stored, numbers_of_left, numbers_of_right

__all__ = [
    "DEFAULT",
    "FEW",
    "INT8_MULTIPLE",
    "ON_CPU",
    "TRACED",
    "Products",
    "kernels",
    "left_add_on_gpu",
    "left_matrix",
    "left_on_gpu",
    "right_matrix",
    "right_on_gpu",
]

FEW = 16
"""Largest number of tokens for which the kernels and the int8 product for few tokens are used."""

INT8_MULTIPLE = 16
"""Columns that torch's int8 product reads at once; it reads beyond bfloat16 rows whose length is not a multiple."""

_INLINED = 8  # largest number of tokens for which a compiler's own loops are faster than a library's matrix product
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PACKED_DTYPES = (torch.float16, torch.bfloat16)  # dtypes of inputs for which torch does not convert int8 rows first


def _dense(factor: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A factor as a float matrix: itself, or int8 rows times their scales, in `dtype`."""
    return factor if scale is None else factor.to(dtype) * scale.to(dtype)[:, None]


def _right(x: Tensor, right: Tensor, scale: Tensor | None = None) -> Tensor:
    factor = _dense(right, scale, x.dtype)
    return F.linear(x if x.dtype == factor.dtype else x.to(factor.dtype), factor)


def _correction(
    x: Tensor, right: Tensor, left: Tensor, right_scale: Tensor | None = None, left_scale: Tensor | None = None
) -> Tensor:
    return _right(_right(x, right, right_scale), left, left_scale)


def _left_add_(output: Tensor, product: Tensor, left: Tensor, scale: Tensor | None = None) -> None:
    output.add_(_right(product, left, scale))


def _right_on_cpu(x: Tensor, right: Tensor, scale: Tensor | None = None) -> Tensor:
    if scale is None or not _is_packable(x, right):
        return _right(x, right, scale)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    found: Tensor = torch._weight_int8pack_mm(rows, right, scale if scale.dtype == x.dtype else scale.to(x.dtype))
    return found if x.dim() == 2 else found.view(*x.shape[:-1], len(right))


def _correction_on_cpu(
    x: Tensor, right: Tensor, left: Tensor, right_scale: Tensor | None = None, left_scale: Tensor | None = None
) -> Tensor:
    return _right_on_cpu(_right_on_cpu(x, right, right_scale), left, left_scale)


def _left_add_in_place(output: Tensor, product: Tensor, left: Tensor, scale: Tensor | None = None) -> None:
    factor = _dense(left, scale, product.dtype)
    if not output.dtype == product.dtype == factor.dtype or not output.is_contiguous():
        output.add_(_right(product, factor))
        return
    rows = output.view(-1, factor.shape[0])
    rows.addmm_(product.reshape(-1, factor.shape[1]), factor.t())


def _is_packable(x: Tensor, factor: Tensor) -> bool:
    """Whether torch's product of few tokens with int8 rows is correct and fast for these tensors."""
    few = 0 < x.numel() <= FEW * x.shape[-1]
    return few and x.dtype in _PACKED_DTYPES and factor.shape[1] % INT8_MULTIPLE == 0 and factor.is_contiguous()


def _traced_right(x: Tensor, right: Tensor, scale: Tensor | None = None) -> Tensor:
    """The right product in torch's own operators, for tracing.

    For few tokens it is a sum, which inductor compiles to one loop that reads the factor once.
    """
    count = 1
    for size in x.shape[:-1]:
        count = count * size
    if torch.compiler.is_exporting() or not isinstance(count, int) or count > _INLINED:
        return _right(x, right, scale)
    dtype = x.dtype if scale is not None else right.dtype
    wide = torch.promote_types(dtype, torch.float32)
    found = (x.to(wide).unsqueeze(-2) * right.to(wide)).sum(-1)
    return (found if scale is None else found * scale.to(wide)).to(dtype)


def _traced_correction(
    x: Tensor, right: Tensor, left: Tensor, right_scale: Tensor | None = None, left_scale: Tensor | None = None
) -> Tensor:
    return _traced_right(_traced_right(x, right, right_scale), left, left_scale)


@cache
def kernels() -> Any:
    """The Triton kernels, or None if they cannot run; then a warning says why, once."""
    import glowq_kernels

    reason = glowq_kernels.unavailable()
    if reason is None:
        return glowq_kernels
    warnings.warn(
        f"the correction runs in plain torch, with more launches than it needs: {reason} pip install 'glowq[triton]' "
        "brings the kernels' compiler.",
        stacklevel=2,
    )
    return None


def _takes_kernels(x: Tensor, *factors: Tensor) -> bool:
    """Whether the kernels support these tensors (few tokens, supported dtypes) and can run."""
    few = x.numel() <= FEW * x.shape[-1]
    known = (*_KERNEL_DTYPES, torch.int8, torch.uint8)
    return few and x.dtype in _KERNEL_DTYPES and all(factor.dtype in known for factor in factors) and bool(kernels())


def right_on_gpu(x: Tensor, right: Tensor, scale: Tensor | None = None, multipliers: Tensor | None = None) -> Tensor:
    """The right product; see `glowq.runtime.operators.right`."""
    if not _takes_kernels(x, right):
        return _right(x, right_matrix(x, right, multipliers), scale)
    product: Tensor = kernels().right(x, right, None if scale is None else scale.float(), multipliers)
    return product


def left_on_gpu(
    product: Tensor, left: Tensor, scale: Tensor | None = None, multipliers: Tensor | None = None
) -> Tensor:
    """The left product; see `glowq.runtime.operators.left`."""
    if multipliers is None:
        return right_on_gpu(product, left, scale)
    assert scale is not None
    output = product.new_zeros((*product.shape[:-1], len(scale)))
    left_add_on_gpu(output, product, left, scale, multipliers)
    return output


def left_add_on_gpu(
    output: Tensor, product: Tensor, left: Tensor, scale: Tensor | None = None, multipliers: Tensor | None = None
) -> None:
    """Add the left product in place; see `glowq.runtime.operators.left_add_`."""
    if _takes_kernels(output, product, left):
        kernels().left_add_(output, product, left, None if scale is None else scale.float(), multipliers)
    else:
        _left_add_in_place(output, product, left_matrix(left, scale, multipliers), scale)


def right_matrix(x: Tensor, factor: Tensor, multipliers: Tensor | None) -> Tensor:
    """A right factor as a matrix; one in blocks as int8."""
    return factor if multipliers is None else numbers_of_right(Stored(factor, multipliers), x.shape[-1])


def left_matrix(factor: Tensor, scale: Tensor | None, multipliers: Tensor | None) -> Tensor:
    """A left factor as a matrix; one in blocks as int8."""
    return factor if multipliers is None or scale is None else numbers_of_left(Stored(factor, multipliers), len(scale))


class Products(NamedTuple):
    """The three products of one implementation."""

    right: Callable[..., Tensor]
    correction: Callable[..., Tensor]
    left_add_: Callable[..., None]


DEFAULT = Products(_right, _correction, _left_add_)
ON_CPU = Products(_right_on_cpu, _correction_on_cpu, _left_add_in_place)
TRACED = Products(_traced_right, _traced_correction, _left_add_)
