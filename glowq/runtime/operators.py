"""The operators that compute a correction: `torch.ops.glowq.right`, `correction` and `left_add_`.

Each operator is registered once in torch's dispatcher, with a default in plain torch for every device and faster
implementations for some devices. If a gradient is needed, torch's own operators compute the same products, so that
derivatives of every order work. All operators take inputs of any leading shape, also an empty one. A factor is a float
matrix, and its dtype is the dtype of the computation; or it is an int8 matrix with one scale per row, and the dtype of
the input is the dtype of the computation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["FEW", "INT8_MULTIPLE", "correction", "joined", "left_add_", "right", "stacked"]

FEW = 16
"""Largest number of tokens for which the kernels and the int8 product for few tokens are used."""

INT8_MULTIPLE = 16
"""Columns that torch's int8 product reads at once; it reads beyond bfloat16 rows whose length is not a multiple."""

_INLINED = 8  # largest number of tokens for which a compiler's own loops are faster than a library's matrix product
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PACKED_DTYPES = (torch.float16, torch.bfloat16)  # dtypes of inputs for which torch does not convert int8 rows first

_LIBRARY = torch.library.Library("glowq", "DEF")
_LIBRARY.define("right(Tensor x, Tensor right, Tensor? scale=None) -> Tensor")
_LIBRARY.define(
    "correction(Tensor x, Tensor right, Tensor left, Tensor? right_scale=None, Tensor? left_scale=None) -> Tensor"
)
_LIBRARY.define("left_add_(Tensor(a!) output, Tensor product, Tensor left, Tensor? scale=None) -> ()")


def right(x: Tensor, right: Tensor, scale: Tensor | None = None) -> Tensor:
    """The right product B x.

    Args:
        x: input, shape (..., d), any float dtype.
        right: right factor B, shape (r, d), float, or int8 with `scale`.
        scale: only for int8: shape (r,), float; each row of B is the row of `right` times its scale.

    Returns:
        Shape (..., r), dtype of `right`, or of x if `right` is int8.
    """
    found: Tensor = _run("right", x, right, scale)
    return found


def correction(
    x: Tensor, right: Tensor, left: Tensor, right_scale: Tensor | None = None, left_scale: Tensor | None = None
) -> Tensor:
    """The corrections of all members of a group, A (B x), concatenated along the last dimension.

    Args:
        x: input, shape (..., d), any float dtype.
        right: right factor B, shape (r, d), float, or int8 with `right_scale`.
        left: left factors of the members, concatenated along the rows, shape (O, r), dtype of `right`.
        right_scale: shape (r,), see `right`.
        left_scale: shape (O,), see `left_add_`.

    Returns:
        Shape (..., O), dtype of `right`, or of x if `right` is int8.
    """
    found: Tensor = _run("correction", x, right, left, right_scale, left_scale)
    return found


def left_add_(output: Tensor, product: Tensor, left: Tensor, scale: Tensor | None = None) -> None:
    """Add one member's left product to its output, in place: output += A p.

    Args:
        output: shape (..., o), any float dtype.
        product: what `right` returned, shape (..., r).
        left: left factor A, shape (o, r), dtype of `product`, or int8 with `scale`.
        scale: only for int8: shape (o,), float; each row of A is the row of `left` times its scale.
    """
    _run("left_add_", output, product, left, scale)


def stacked(factors: Sequence[Tensor]) -> list[Tensor]:
    """Copy factors into one block of memory, one after the other; returns one tensor per factor.

    Args:
        factors: shapes (o_i, r), all of one dtype and device.
    """
    whole = torch.cat(list(factors))
    return list(whole.split([len(factor) for factor in factors]))


def joined(factors: Sequence[Tensor]) -> Tensor | None:
    """All factors as one tensor, shape (O, r), without a copy; None if they do not follow each other in memory."""
    first = factors[0]
    if first.is_meta or not first.is_contiguous():
        return None
    (rows, rank), size = first.shape, first.element_size()
    start = first.data_ptr()
    for factor in factors[1:]:
        if factor.data_ptr() != start + rows * rank * size or not factor.is_contiguous():
            return None
        rows += factor.shape[0]
    if (first.storage_offset() + rows * rank) * size > first.untyped_storage().nbytes():
        return None  # different allocations that are adjacent by chance
    return first.as_strided((rows, rank), (rank, 1))


def _run(name: str, x: Tensor, *others: Any) -> Any:
    if torch.compiler.is_compiling():
        # Exporters support only torch's own operators. On the CPU, compilers fuse those with the code that follows.
        plain = x.device.type == "cpu" or torch.compiler.is_exporting()
        return _TRACED[name](x, *others) if plain else _OPERATORS[name](x, *others)
    if type(x) is Tensor and x.is_cpu:  # the same function that the dispatcher would call, some microseconds earlier
        return (_DEFAULT if torch.is_grad_enabled() else _ON_CPU)[name](x, *others)
    return _OPERATORS[name](x, *others)


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
def _kernels() -> Any:
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
    known = (*_KERNEL_DTYPES, torch.int8)
    return few and x.dtype in _KERNEL_DTYPES and all(factor.dtype in known for factor in factors) and bool(_kernels())


def _right_on_gpu(x: Tensor, right: Tensor, scale: Tensor | None = None) -> Tensor:
    if not _takes_kernels(x, right):
        return _right(x, right, scale)
    product: Tensor = _kernels().right(x, right, None if scale is None else scale.float())
    return product


def _left_add_on_gpu(output: Tensor, product: Tensor, left: Tensor, scale: Tensor | None = None) -> None:
    if _takes_kernels(output, product, left):
        _kernels().left_add_(output, product, left, None if scale is None else scale.float())
    else:
        _left_add_in_place(output, product, left, scale)


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


_Products = dict[str, Callable[..., Any]]
_DEFAULT: _Products = {"right": _right, "correction": _correction, "left_add_": _left_add_}
_ON_CPU: _Products = {"right": _right_on_cpu, "correction": _correction_on_cpu, "left_add_": _left_add_in_place}
_TRACED: _Products = {"right": _traced_right, "correction": _traced_correction, "left_add_": _left_add_}
_OPERATORS = {name: getattr(torch.ops.glowq, name).default for name in _DEFAULT}

for _name, _operator in _OPERATORS.items():
    _LIBRARY.impl(_name, _DEFAULT[_name], "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _with_gradients(_operator, _DEFAULT[_name]), "Autograd")
    _LIBRARY.impl(_name, _ON_CPU[_name], "CPU")
for _device in ("CUDA", "XPU"):  # torch calls ROCm's devices "CUDA" too
    _LIBRARY.impl("right", _right_on_gpu, _device)
    _LIBRARY.impl("left_add_", _left_add_on_gpu, _device)
