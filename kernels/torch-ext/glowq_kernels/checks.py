"""Checks of the arguments of every function, made before a kernel is launched."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KernelError"]

_BLOCK = 32  # numbers in a block
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class KernelError(ValueError):
    """Raised if a kernel does not accept its tensors or cannot run on this machine. No output has been written."""


def check_right(x: Tensor, right: Tensor, scale: Tensor | None, multipliers: Tensor | None) -> None:
    """Raise KernelError if `right` does not accept these tensors."""
    _check_floating("x", x)
    _check_vectors("x", x)
    _check_factor("right", right, len(right) if right.dim() else 0, scale, multipliers)
    if right.shape[1] != (x.shape[-1] if multipliers is None else -(-x.shape[-1] // _BLOCK)):
        raise KernelError(
            f"right must have one {_unit('column', multipliers)} of the {x.shape[-1]} input channels of x, found "
            f"{right.shape[1]}; pass the right factor of the group that reads x."
        )
    _check_together(x=x, right=right, scale=scale, multipliers=multipliers)


def check_left_add(
    output: Tensor, product: Tensor, left: Tensor, scale: Tensor | None, multipliers: Tensor | None
) -> None:
    """Raise KernelError if `left_add_` does not accept these tensors."""
    _check_floating("output", output)
    _check_vectors("output", output)
    _check_low_rank(output, output.shape[-1], product, left, scale, multipliers)
    if _overlaps_itself(output):
        raise KernelError(
            f"no two elements of output may share memory, found shape {tuple(output.shape)} with strides "
            f"{output.stride()}; call contiguous() on it first."
        )
    _check_together(output=output, product=product, left=left, scale=scale, multipliers=multipliers)


def check_gptq(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
    g_idx: Tensor | None,
    bias: Tensor | None,
    product: Tensor | None,
    left: Tensor | None,
    left_scale: Tensor | None,
    left_multipliers: Tensor | None,
) -> None:
    """Raise KernelError if `gptq_linear` does not accept these arguments."""
    if bits != 4:
        raise KernelError(f"bits must be 4, nothing else is implemented, found {bits}; dequantize this weight instead.")
    if group_size != -1 and group_size < 1:
        raise KernelError(f"group_size must be positive, or -1 for one group, found {group_size}.")
    _check_floating("x", x)
    _check_vectors("x", x)
    inputs = x.shape[-1]
    if qweight.dtype is not torch.int32 or qweight.dim() != 2 or inputs % 8 or qweight.shape[0] != inputs // 8:
        raise KernelError(
            f"qweight must be int32 of shape (d / 8, o), where d = {inputs} is the number of input channels of x and "
            f"must be a multiple of 8, found {_described(qweight)}; pass the packed weight as the checkpoint stores it."
        )
    outputs = qweight.shape[1]
    if outputs % 8:
        raise KernelError(
            f"qweight must have a multiple of 8 columns, because the zero points of 8 outputs share a word, found "
            f"{outputs}; pad the outputs."
        )
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    _check_shape("scales", scales, (groups, outputs))
    _check_floating("scales", scales)
    _check_shape("qzeros", qzeros, (groups, outputs // 8))
    _check_dtype("qzeros", qzeros, torch.int32)
    if g_idx is not None:
        _check_shape("g_idx", g_idx, (inputs,))
        _check_dtype("g_idx", g_idx, torch.int32, torch.int64)
    _check_contiguous(qweight=qweight, qzeros=qzeros, scales=scales, g_idx=g_idx)
    _check_epilogue(x, outputs, bias, product, left, left_scale, left_multipliers)
    _check_together(
        x=x,
        qweight=qweight,
        qzeros=qzeros,
        scales=scales,
        g_idx=g_idx,
        bias=bias,
        product=product,
        left=left,
        left_scale=left_scale,
        left_multipliers=left_multipliers,
    )


def check_nf4(
    x: Tensor,
    qweight: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    product: Tensor | None,
    left: Tensor | None,
    left_scale: Tensor | None,
    left_multipliers: Tensor | None,
) -> None:
    """Raise KernelError if `nf4_linear` does not accept these arguments."""
    _check_floating("x", x)
    _check_vectors("x", x)
    inputs = x.shape[-1]
    if inputs % 2:
        raise KernelError(
            f"x must have an even number of input channels, because the weights of two channels share a byte, found "
            f"{inputs}; dequantize this weight instead."
        )
    if blocksize < 2 or blocksize & (blocksize - 1):
        raise KernelError(f"blocksize must be a power of two, as in bitsandbytes, found {blocksize}.")
    if out_features < 1:
        raise KernelError(f"out_features must be at least 1, found {out_features}.")
    _check_dtype("qweight", qweight, torch.uint8)
    if qweight.numel() * 2 != out_features * inputs:
        raise KernelError(
            f"qweight must hold {out_features * inputs // 2} bytes, each with two values of the weight "
            f"({out_features}, {inputs}), found {qweight.numel()}; check out_features."
        )
    _check_shape("absmax", absmax, (-(-out_features * inputs // blocksize),))
    _check_dtype("absmax", absmax, torch.float32)
    _check_shape("code", code, (16,))
    _check_dtype("code", code, torch.float32)
    _check_contiguous(qweight=qweight, absmax=absmax, code=code)
    _check_epilogue(x, out_features, bias, product, left, left_scale, left_multipliers)
    _check_together(
        x=x,
        qweight=qweight,
        absmax=absmax,
        code=code,
        bias=bias,
        product=product,
        left=left,
        left_scale=left_scale,
        left_multipliers=left_multipliers,
    )


def _check_epilogue(
    x: Tensor,
    outputs: int,
    bias: Tensor | None,
    product: Tensor | None,
    left: Tensor | None,
    scale: Tensor | None,
    multipliers: Tensor | None,
) -> None:
    """Raise KernelError if the bias or the low-rank product and its left factor do not fit x and the outputs."""
    if bias is not None:
        _check_shape("bias", bias, (outputs,))
        _check_floating("bias", bias)
        _check_contiguous(bias=bias)
    if (product is None) != (left is None):
        given, missing = ("product", "left") if left is None else ("left", "product")
        raise KernelError(f"product and left come together, found {given} without {missing}; pass both or neither.")
    if product is not None and left is not None:
        _check_low_rank(x, outputs, product, left, scale, multipliers, "left_")
    else:
        for name, given in (("left_scale", scale), ("left_multipliers", multipliers)):
            if given is not None:
                raise KernelError(f"{name} must come with left, found it alone; pass product and left, or no {name}.")


def _check_low_rank(
    like: Tensor,
    outputs: int,
    product: Tensor,
    left: Tensor,
    scale: Tensor | None,
    multipliers: Tensor | None,
    prefix: str = "",
) -> None:
    _check_floating("product", product)
    _check_factor("left", left, outputs, scale, multipliers, prefix)
    if left.shape[0] != (outputs if multipliers is None else -(-outputs // _BLOCK)):
        raise KernelError(
            f"left must have one {_unit('row', multipliers)} of the {outputs} outputs, found {left.shape[0]}; stack "
            "the left factors of the members in the order of their outputs."
        )
    expected = (*like.shape[:-1], left.shape[1])
    if tuple(product.shape) != expected:
        raise KernelError(
            f"product must have shape {expected}, one entry for each token and rank, found {tuple(product.shape)}; "
            "pass what `right` returned for the same tokens."
        )


def _unit(name: str, multipliers: Tensor | None) -> str:
    return f"{name} for each" if multipliers is None else f"block for every {_BLOCK}"


def _check_factor(
    name: str, factor: Tensor, rows: int, scale: Tensor | None, multipliers: Tensor | None, prefix: str = ""
) -> None:
    """Raise KernelError unless the factor is a matrix or in blocks, with what its dtype needs.

    Args:
        rows: rows of the factor as a matrix; each has a scale if it is one of integers.
        prefix: what the names of its scale and multipliers begin with.
    """
    scale_name, multipliers_name = f"{prefix}scale", f"{prefix}multipliers"
    if factor.dtype in (torch.int8, torch.uint8):
        if scale is None:
            raise KernelError(
                f"{name} is {_name(factor.dtype)}, which needs {scale_name}, float32 with one value per row; pass it."
            )
    elif factor.dtype not in FLOATS:
        raise KernelError(
            f"{name} must be a float of 16 or 32 bits or int8, or codes in uint8, found {_name(factor.dtype)}; convert "
            "it."
        )
    elif scale is not None:
        raise KernelError(f"{scale_name} belongs to an int8 factor, found {name} of {_name(factor.dtype)}; drop it.")
    if factor.dtype is torch.uint8:
        if multipliers is None or factor.dim() != 3 or factor.shape[-1] not in (12, 16) or not factor.numel():
            raise KernelError(
                f"{name} is uint8, which needs blocks of 16 or 12 bytes, shape (..., ..., 16 or 12), and "
                f"{multipliers_name}; found shape {tuple(factor.shape)}."
            )
        _check_shape(multipliers_name, multipliers, tuple(factor.shape[:2]))
        _check_dtype(multipliers_name, multipliers, torch.int8)
        _check_contiguous(**{name: factor, multipliers_name: multipliers})
    elif multipliers is not None:
        raise KernelError(
            f"{multipliers_name} belongs to a factor in blocks, found {name} of {_name(factor.dtype)}; drop it."
        )
    else:
        ranks, axis = ("rows", 0) if name == "right" else ("columns", 1)
        if factor.dim() != 2 or factor.shape[axis] < 1:
            raise KernelError(
                f"{name} must be a matrix with as many {ranks} as the rank, at least one, found shape "
                f"{tuple(factor.shape)}; leave out a correction of rank 0."
            )
        rows = factor.shape[0]
    if scale is not None:
        _check_shape(scale_name, scale, (rows,))
        _check_dtype(scale_name, scale, torch.float32)
        _check_contiguous(**{scale_name: scale})


def _check_together(**tensors: Tensor | None) -> None:
    """Raise KernelError if tensors are on different devices, or if autograd would need a gradient of one."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    devices = {name: tensor.device for name, tensor in given.items()}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise KernelError(f"all tensors must be on one device, found {found}; move them.")
    wanted = [name for name, tensor in given.items() if tensor.requires_grad]
    if wanted and torch.is_grad_enabled():
        raise KernelError(
            f"the kernels have no backward, found {', '.join(wanted)} requiring a gradient; call them under "
            "torch.no_grad(), or use the functions of `twins`."
        )


def _check_vectors(name: str, tensor: Tensor) -> None:
    if tensor.dim() < 1 or tensor.shape[-1] < 1:
        raise KernelError(f"{name} must have shape (..., n) with n at least 1, found {tuple(tensor.shape)}.")


def _check_floating(name: str, tensor: Tensor) -> None:
    _check_dtype(name, tensor, *FLOATS)


def _check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        expected = " or ".join(_name(dtype) for dtype in allowed)
        raise KernelError(f"{name} must be {expected}, found {_name(tensor.dtype)}; convert it.")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise KernelError(f"{name} must have shape {expected}, found {tuple(tensor.shape)}.")


def _check_contiguous(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise KernelError(f"{name} must be contiguous, found strides {tensor.stride()}; call contiguous() once.")


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory: a stride is shorter than the span of the dimensions inside it."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):  # noqa: B905 (Python 3.9 has no strict)
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def _described(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} {tuple(tensor.shape)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
