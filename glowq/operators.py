"""The operators that a correction is computed with: `torch.ops.glowq.right`, `correction` and `left_add_`.

Each is declared once, in torch's own dispatcher: a default in plain torch for every device, a better one where a
device has it. Gradients come from the same products in torch's own operators, so that every order of differentiation
works. All of them take inputs of any leading shape, an empty one too, and compute in the factors' dtype.
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

__all__ = ["correction", "left_add_", "lie_together", "right", "stacked"]

_FEW = 16  # tokens that the kernels are made for
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_LIBRARY = torch.library.Library("glowq", "DEF")
_LIBRARY.define("right(Tensor x, Tensor right) -> Tensor")
_LIBRARY.define("correction(Tensor x, Tensor right, Tensor[] lefts) -> Tensor")
_LIBRARY.define("left_add_(Tensor(a!) output, Tensor product, Tensor left) -> ()")


def right(x: Tensor, right: Tensor) -> Tensor:
    """Right product B x.

    Args:
        x: input, shape (..., d), any float dtype.
        right: right factor B, shape (r, d).

    Returns:
        Shape (..., r), dtype of `right`.
    """
    found: Tensor = _run("right", x, right)
    return found


def correction(x: Tensor, right: Tensor, lefts: Sequence[Tensor]) -> Tensor:
    """What a group adds to its members' outputs, A (B x), the members side by side.

    Args:
        x: input, shape (..., d), any float dtype.
        right: right factor B, shape (r, d).
        lefts: left factor of each member, shapes (o_i, r), dtype of `right`. Where they lie in memory one after the
            other, as `stacked` leaves them, one product serves all.

    Returns:
        Shape (..., O) with O = sum of o_i, dtype of `right`.
    """
    found: Tensor = _run("correction", x, right, lefts)
    return found


def left_add_(output: Tensor, product: Tensor, left: Tensor) -> None:
    """Add one member's left product to its output, in place: output += A p.

    Args:
        output: shape (..., o), any float dtype.
        product: what `right` returned, shape (..., r).
        left: left factor A, shape (o, r), dtype of `product`.
    """
    _run("left_add_", output, product, left)


def stacked(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same factors one after the other in one piece of memory, each still a tensor of its own.

    Args:
        factors: shapes (o_i, r), of one dtype and device.
    """
    whole = torch.cat(list(factors))
    return list(whole.split([len(factor) for factor in factors]))


def lie_together(lefts: Sequence[Tensor]) -> bool:
    """Whether `correction` multiplies by these left factors at once."""
    return _whole(lefts) is not None


def _run(name: str, x: Tensor, *others: Any) -> Any:
    if torch.compiler.is_compiling():
        known_to_exporters = torch.compiler.is_exporting()
        return _PLAIN[name](x, *others) if known_to_exporters else _OPERATORS[name](x, *others)
    if type(x) is Tensor and x.is_cpu:  # where the dispatcher would arrive, some microseconds later
        return (_PLAIN if torch.is_grad_enabled() else _ON_CPU)[name](x, *others)
    return _OPERATORS[name](x, *others)


def _right(x: Tensor, right: Tensor) -> Tensor:
    return F.linear(x if x.dtype == right.dtype else x.to(right.dtype), right)


def _correction(x: Tensor, right: Tensor, lefts: Sequence[Tensor]) -> Tensor:
    product = _right(x, right)
    if len(lefts) == 1:
        return F.linear(product, lefts[0])
    whole = _whole(lefts)
    if whole is not None:
        return F.linear(product, whole)
    return torch.cat([F.linear(product, left) for left in lefts], -1)


def _left_add_(output: Tensor, product: Tensor, left: Tensor) -> None:
    output.add_(F.linear(product, left))


def _left_add_in_place(output: Tensor, product: Tensor, left: Tensor) -> None:
    if not output.dtype == product.dtype == left.dtype or not output.is_contiguous():
        return _left_add_(output, product, left)
    rows = output.view(-1, left.shape[0])
    rows.addmm_(product.reshape(-1, left.shape[1]), left.t())
    return None


@cache
def _kernels() -> Any:
    """The Triton kernels, or None where they cannot run, said once."""
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
    """Whether the kernels are made for these tensors: a few tokens, of dtypes that they know."""
    few = x.numel() <= _FEW * x.shape[-1]
    return few and all(tensor.dtype in _KERNEL_DTYPES for tensor in (x, *factors)) and _kernels() is not None


def _right_on_gpu(x: Tensor, right: Tensor) -> Tensor:
    if not _takes_kernels(x, right):
        return _right(x, right)
    product: Tensor = _kernels().right(x, right)
    return product


def _left_add_on_gpu(output: Tensor, product: Tensor, left: Tensor) -> None:
    if _takes_kernels(output, product, left):
        _kernels().left_add_(output, product, left)
    else:
        _left_add_in_place(output, product, left)


def _whole(lefts: Sequence[Tensor]) -> Tensor | None:
    """All factors as one, shape (O, r), if they lie one after the other."""
    first = lefts[0]
    if first.is_meta or not first.is_contiguous():
        return None
    (rows, rank), size = first.shape, first.element_size()
    start = first.data_ptr()
    for left in lefts[1:]:
        if left.data_ptr() != start + rows * rank * size or not left.is_contiguous():
            return None
        rows += left.shape[0]
    if (first.storage_offset() + rows * rank) * size > first.untyped_storage().nbytes():
        return None  # neighbours by chance
    return first.as_strided((rows, rank), (rank, 1))


def _plain_correction(x: Tensor, right: Tensor, lefts: Sequence[Tensor]) -> Tensor:
    product = _right(x, right)
    return torch.cat([F.linear(product, left) for left in lefts], -1)


def _with_gradients(operator: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    """What runs where a gradient may be wanted: torch's own operators if one is, else the operator itself."""

    def run(*arguments: Any) -> Any:
        tensors = [t for argument in arguments for t in (argument if isinstance(argument, list) else [argument])]
        backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if backward or forward_ad._current_level >= 0:
            return plain(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return run


_DEFAULT: dict[str, Callable[..., Any]] = {"right": _right, "correction": _correction, "left_add_": _left_add_}
_ON_CPU = {**_DEFAULT, "left_add_": _left_add_in_place}
_PLAIN = {**_DEFAULT, "correction": _plain_correction}
_OPERATORS = {name: getattr(torch.ops.glowq, name).default for name in _DEFAULT}

for _name, _operator in _OPERATORS.items():
    _LIBRARY.impl(_name, _DEFAULT[_name], "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _with_gradients(_operator, _PLAIN[_name]), "Autograd")
_LIBRARY.impl("left_add_", _left_add_in_place, "CPU")
for _device in ("CUDA", "XPU"):  # ROCm's devices go by CUDA's name
    _LIBRARY.impl("right", _right_on_gpu, _device)
    _LIBRARY.impl("left_add_", _left_add_on_gpu, _device)
