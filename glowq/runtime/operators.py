"""The operators that compute a correction: `torch.ops.glowq.right`, `correction` and `left_add_`.

Each operator is registered once in torch's dispatcher, with a default in plain torch for every device and faster
implementations for some devices. If a gradient is needed, torch's own operators compute the same products, so that
derivatives of every order work. All operators take inputs of any leading shape, also an empty one. A factor is a float
matrix, and its dtype is the dtype of the computation; or it is an int8 matrix with one scale per row, and the dtype of
the input is the dtype of the computation. Blocks of 4 or 3 bits (see `glowq.factors.blocks`) come with the multipliers
of the blocks. They are unpacked to int8 for the product, unless a kernel reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import products
from .products import Products, left_matrix, right_matrix

__all__ = ["correction", "joined", "left", "left_add_", "right", "stacked"]

_LIBRARY = torch.library.Library("glowq", "DEF")
_LIBRARY.define("right(Tensor x, Tensor right, Tensor? scale=None, Tensor? multipliers=None) -> Tensor")
_LIBRARY.define("left(Tensor product, Tensor left, Tensor? scale=None, Tensor? multipliers=None) -> Tensor")
_LIBRARY.define(
    "correction(Tensor x, Tensor right, Tensor left, Tensor? right_scale=None, Tensor? left_scale=None, "
    "Tensor? right_multipliers=None, Tensor? left_multipliers=None) -> Tensor"
)
_LIBRARY.define(
    "left_add_(Tensor(a!) output, Tensor product, Tensor left, Tensor? scale=None, Tensor? multipliers=None) -> ()"
)


def right(x: Tensor, right: Tensor, scale: Tensor | None = None, multipliers: Tensor | None = None) -> Tensor:
    """The right product B x.

    Args:
        x: input, shape (..., d), any float dtype.
        right: right factor B, shape (r, d), float, or int8 with `scale`; or the codes of its blocks, uint8, shape
            (r, blocks, 4 * bits), with `multipliers`.
        scale: only for whole numbers: shape (r,), float; each row of B is the row of `right` times its scale.
        multipliers: only for blocks of 4 or 3 bits: shape (r, blocks), int8.

    Returns:
        Shape (..., r), dtype of `right`, or of x if `right` is not float.
    """
    found: Tensor = _run("right", x, right, scale, multipliers)
    return found


def left(product: Tensor, left: Tensor, scale: Tensor | None = None, multipliers: Tensor | None = None) -> Tensor:
    """The left product A p of one member.

    Args:
        product: what `right` returned, shape (..., r).
        left: left factor A, shape (o, r), float, or int8 with `scale`; or the codes of its blocks, uint8, shape
            (blocks, r, 4 * bits), with `multipliers`.
        scale: only for whole numbers: shape (o,), float; each row of A is the row of `left` times its scale.
        multipliers: only for blocks of 4 or 3 bits: shape (blocks, r), int8.

    Returns:
        Shape (..., o), dtype of `left`, or of the product if `left` is not float.
    """
    found: Tensor = _run("left", product, left, scale, multipliers)
    return found


def correction(
    x: Tensor,
    right: Tensor,
    left: Tensor,
    right_scale: Tensor | None = None,
    left_scale: Tensor | None = None,
    right_multipliers: Tensor | None = None,
    left_multipliers: Tensor | None = None,
) -> Tensor:
    """The corrections of all members of a group, A (B x), concatenated along the last dimension.

    Args:
        x: input, shape (..., d), any float dtype.
        right, right_scale, right_multipliers: see `right`.
        left, left_scale, left_multipliers: left factors of the members, concatenated along their first dimension; see
            `left`. Outputs that fill the last block of a member are counted in O.

    Returns:
        Shape (..., O), dtype of `right`, or of x if `right` is not float.
    """
    found: Tensor = _run("correction", x, right, left, right_scale, left_scale, right_multipliers, left_multipliers)
    return found


def left_add_(
    output: Tensor, product: Tensor, left: Tensor, scale: Tensor | None = None, multipliers: Tensor | None = None
) -> None:
    """Add one member's left product to its output, in place: output += A p.

    Args:
        output: shape (..., o), any float dtype.
        product, left, scale, multipliers: see `left`.
    """
    _run("left_add_", output, product, left, scale, multipliers)


def stacked(factors: Sequence[Tensor]) -> list[Tensor]:
    """Copy factors into one block of memory, one after the other; returns one tensor per factor.

    Args:
        factors: equal in all dimensions but the first, and of one dtype and device.
    """
    whole = torch.cat(list(factors))
    return list(whole.split([len(factor) for factor in factors]))


def joined(factors: Sequence[Tensor]) -> Tensor | None:
    """All factors, concatenated along the first dimension, without a copy; None if they are not one after the other."""
    first = factors[0]
    if first.is_meta or not first.is_contiguous():
        return None
    rows, size, each = 0, first.element_size(), first[:1].numel()
    start = first.data_ptr()
    for factor in factors:
        if factor.data_ptr() != start + rows * each * size or not factor.is_contiguous():
            return None
        rows += factor.shape[0]
    if (first.storage_offset() + rows * each) * size > first.untyped_storage().nbytes():
        return None  # different allocations that are adjacent by chance
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _run(name: str, x: Tensor, *others: Any) -> Any:
    if torch.compiler.is_compiling():
        # Exporters support only torch's own operators. On the CPU, compilers fuse those with the code that follows.
        plain = x.device.type == "cpu" or torch.compiler.is_exporting()
        return _TRACED[name](x, *others) if plain else _OPERATORS[name](x, *others)
    if type(x) is Tensor and x.is_cpu:  # the same function that the dispatcher would call, some microseconds earlier
        return (_DEFAULT if torch.is_grad_enabled() else _ON_CPU)[name](x, *others)
    return _OPERATORS[name](x, *others)


def _with_gradients(operator: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation for autograd: torch's own operators if a gradient is needed, otherwise the operator itself."""

    def run(*arguments: Any) -> Any:
        backward = torch.is_grad_enabled() and any(
            argument.requires_grad for argument in arguments if argument is not None
        )
        if backward or forward_ad._current_level >= 0:
            return plain(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return run


def _with_blocks(matrix_products: Products) -> dict[str, Callable[..., Any]]:
    """The operators by the products of matrices: blocks are unpacked to int8 matrices first."""
    right, correction, left_add_ = matrix_products

    def right_(x: Tensor, factor: Tensor, scale: Any = None, multipliers: Any = None) -> Any:
        return right(x, right_matrix(x, factor, multipliers), scale)

    def left(product: Tensor, factor: Tensor, scale: Any = None, multipliers: Any = None) -> Any:
        return right(product, left_matrix(factor, scale, multipliers), scale)

    def correction_(
        x: Tensor,
        first: Tensor,
        second: Tensor,
        right_scale: Any = None,
        left_scale: Any = None,
        right_multipliers: Any = None,
        left_multipliers: Any = None,
    ) -> Any:
        first = right_matrix(x, first, right_multipliers)
        return correction(x, first, left_matrix(second, left_scale, left_multipliers), right_scale, left_scale)

    def left_add(output: Tensor, product: Tensor, factor: Tensor, scale: Any = None, multipliers: Any = None) -> None:
        left_add_(output, product, left_matrix(factor, scale, multipliers), scale)

    return {"right": right_, "left": left, "correction": correction_, "left_add_": left_add}


_DEFAULT, _ON_CPU, _TRACED = map(_with_blocks, (products.DEFAULT, products.ON_CPU, products.TRACED))
_ON_GPU = {
    "right": products.right_on_gpu,
    "left": products.left_on_gpu,
    "correction": _DEFAULT["correction"],
    "left_add_": products.left_add_on_gpu,
}
_OPERATORS = {name: getattr(torch.ops.glowq, name).default for name in _DEFAULT}

for _name, _operator in _OPERATORS.items():
    _LIBRARY.impl(_name, _DEFAULT[_name], "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _with_gradients(_operator, _DEFAULT[_name]), "Autograd")
    _LIBRARY.impl(_name, _ON_CPU[_name], "CPU")
    for _device in ("CUDA", "XPU"):  # torch calls ROCm's devices "CUDA" too
        _LIBRARY.impl(_name, _ON_GPU[_name], _device)
