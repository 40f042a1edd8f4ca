"""Quantized linear modules as ONNX Runtime's own operators: MatMulNBits for integers, MatMulBnb4 for nf4 and fp4.

An operator computes the same product in two ways: in the graph, ONNX Runtime's kernel reads its packed tensors; in
memory, it unpacks the same tensors and computes a dense product. So a model that holds operators gives the outputs that
the graph must give.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ...errors import ExportError
from ...quantizers.base import Backend, Scheme
from ...quantizers.model import quantized_modules, read_weight
from .grid import BLOCKS, Grid, fit_grid, is_rounding_of

__all__ = ["MatMulBnb4", "MatMulNBits", "Operator", "operator_of", "use_operators"]

_BITS = (2, 4, 8)
_TABLES = {"fp4": 0, "nf4": 1}  # format -> MatMulBnb4's attribute quant_type
_INSTEAD = "Export it with --to merged, or correct another base"


class Operator(nn.Module, ABC):
    """A linear layer y = Q x + b in float32, where Q is quantized.

    Attributes:
        kind: the operator's name in ONNX Runtime's domain com.microsoft.
        shape: shape of Q, (out_features, in_features).
    """

    kind: ClassVar[str]
    bias: Tensor | None

    def __init__(self, shape: tuple[int, int], bias: Tensor | None) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("bias", None if bias is None else bias.detach().to("cpu", torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Q x + b, shape (..., out_features), for x of shape (..., in_features)."""
        product = self._symbol(x) if torch.onnx.is_in_onnx_export() else F.linear(x, self.dense())
        return product if self.bias is None else product + self.bias

    def _symbol(self, x: Tensor) -> Tensor:
        outputs, inputs = self.shape
        return torch.onnx.ops.symbolic(
            f"com.microsoft::{self.kind}",
            [x, *self.operands()],
            attrs={"K": inputs, "N": outputs, **self.attributes()},
            dtype=x.dtype,
            shape=[*x.shape[:-1], outputs],
            version=1,
        )

    @abstractmethod
    def dense(self) -> Tensor:
        """Q from the packed tensors, float32, shape (out_features, in_features)."""

    @abstractmethod
    def operands(self) -> list[Tensor]:
        """The operator's inputs after x."""

    @abstractmethod
    def attributes(self) -> dict[str, int]:
        """The operator's attributes besides K and N."""


class MatMulNBits(Operator):
    """Q = (codes - zero points) * scales, with one scale per block of a row; codes of 2, 4 or 8 bits.

    Attributes:
        codes: packed codes, lowest bits first, uint8, shape (out_features, blocks, block * bits / 8).
        scales: float32, shape (out_features, blocks).
        zeros: zero points, packed like the codes, uint8, shape (out_features, ceil(blocks * bits / 8)); or not packed,
            float32, shape (out_features, blocks); or None if every zero point is the middle code.
    """

    kind = "MatMulNBits"
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, grid: Grid, bias: Tensor | None) -> None:
        super().__init__((grid.codes.shape[0], grid.codes.shape[1]), bias)
        self.bits, self.block = grid.bits, grid.block
        blocks = grid.scales.shape[1]
        padded = F.pad(grid.codes, (0, blocks * grid.block - grid.codes.shape[1]))
        self.register_buffer("codes", _pack(padded.unflatten(1, (blocks, grid.block)), grid.bits))
        self.register_buffer("scales", grid.scales)
        zeros = grid.zeros
        if zeros is not None and not zeros.is_floating_point():
            zeros = _pack(zeros, grid.bits)
        self.register_buffer("zeros", zeros)

    def dense(self) -> Tensor:
        blocks = self.scales.shape[1]
        codes = _unpack(self.codes, self.bits).float()
        if self.zeros is None:
            zeros = torch.full_like(self.scales, 2 ** (self.bits - 1))
        elif self.zeros.is_floating_point():
            zeros = self.zeros
        else:
            zeros = _unpack(self.zeros, self.bits)[:, :blocks].float()
        return ((codes - zeros.unsqueeze(-1)) * self.scales.unsqueeze(-1)).flatten(1)[:, : self.shape[1]]

    def operands(self) -> list[Tensor]:
        return [self.codes, self.scales, *([] if self.zeros is None else [self.zeros])]

    def attributes(self) -> dict[str, int]:
        return {"bits": self.bits, "block_size": self.block, "accuracy_level": 1}  # 1: computes in float32


class MatMulBnb4(Operator):
    """bitsandbytes' nf4 and fp4, with the same packed codes; scales with double quantization are dequantized.

    Attributes:
        codes: two codes per byte of the flattened weight, uint8, shape (out_features * in_features / 2,).
        absmax: one scale per block, float32.
        table: the value of each code, shape (16,), for the dense product; ONNX Runtime has its own table.
    """

    kind = "MatMulBnb4"
    codes: Tensor
    absmax: Tensor

    def __init__(self, codes: Tensor, absmax: Tensor, scheme: Scheme, table: Tensor, *rest: Any) -> None:
        super().__init__(*rest)
        self.register_buffer("codes", codes.flatten().cpu())
        self.register_buffer("absmax", absmax.flatten().to("cpu", torch.float32))
        self.table, self.block, self.quant_type = table.float().cpu(), scheme.group_size or 0, _TABLES[scheme.format]

    def dense(self) -> Tensor:
        outputs, inputs = self.shape
        codes = torch.stack([self.codes >> 4, self.codes & 15], dim=-1).flatten()[: outputs * inputs]
        scales = self.absmax.repeat_interleave(self.block)[: outputs * inputs]
        return (self.table[codes.long()] * scales).reshape(outputs, inputs)

    def operands(self) -> list[Tensor]:
        return [self.codes, self.absmax]

    def attributes(self) -> dict[str, int]:
        return {"block_size": self.block, "quant_type": self.quant_type}


def use_operators(model: nn.Module) -> None:
    """Replace every quantized module of `model` by an operator, and convert everything else to float32 on the CPU.

    The correction stays attached. All operators are made before the first module is replaced, so that an error leaves
    the model unchanged.

    Raises:
        ExportError, BackendError, NonFiniteError: see `operator_of`.
    """
    modules = quantized_modules(model)
    made = {name: operator_of(name, backend, model.get_submodule(name)) for name, backend in modules.items()}
    for name, operator in made.items():
        if operator is not None:
            module = model.get_submodule(name)
            operator._forward_hooks = module._forward_hooks
            operator._forward_hooks_with_kwargs = module._forward_hooks_with_kwargs
            model.set_submodule(name, operator)
    remove_hook_from_module(model, recurse=True)
    nn.Module.to(model, "cpu", torch.float32)  # PreTrainedModel.to would refuse, as it does for quantized models
    model.eval()


def operator_of(name: str, backend: Backend, module: nn.Module) -> Operator | None:
    """Make the operator that replaces a quantized module.

    Args:
        name: full module name, for messages.
        backend: the backend of the module.
        module: the quantized module.

    Returns:
        The operator, or None if the module's weight is dense and needs no operator.

    Raises:
        ExportError: ONNX Runtime has no operator for the module's packing, or the operator would not compute with the
            weight that the module's library multiplies by.
        BackendError, NonFiniteError: the weight cannot be read, see `glowq.quantizers.model.read_weight`.
    """
    weight = read_weight(backend, name, module)  # called first, because it checks the scales
    with align_module_device(module), torch.no_grad():
        scheme, scales = backend.scheme(module), backend.scales(module)
        if not scales:
            return None
        _refuse(name, backend, module, scheme)
        bias: Any = module.bias
        if scheme.format in _TABLES:
            return _four_bit_floats(name, backend, module, scheme, weight, bias)
        grid = fit_grid(weight.cpu(), scales[0].cpu(), int(scheme.bits), scheme.group_size)
    if grid is None:
        raise ExportError(
            f"{name} ({scheme}): its {backend.name} weight is not whole codes of {scheme.bits} bits times the scales "
            f"that are stored with it, which is all that MatMulNBits can hold. {_INSTEAD}."
        )
    if grid.bits == 8 and grid.zeros is not None and grid.zeros.is_floating_point():
        raise ExportError(f"{name} ({scheme}): MatMulNBits takes 8 bits only with whole zero points. {_INSTEAD}.")
    return MatMulNBits(grid, bias)


def _four_bit_floats(
    name: str, backend: Backend, module: Any, scheme: Scheme, weight: Tensor, bias: Tensor | None
) -> Operator:
    from bitsandbytes.functional import dequantize_blockwise

    state = module.weight.quant_state
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    shape = (weight.shape[0], weight.shape[1])
    operator = MatMulBnb4(backend.codes(module)[0], absmax, scheme, state.code, shape, bias)
    if not is_rounding_of(weight.cpu(), operator.dense()):
        raise ExportError(
            f"{name} ({scheme}): bitsandbytes reads its own bytes differently for this shape {shape}, so that "
            f"MatMulBnb4 would compute something else. {_INSTEAD}."
        )
    return operator


def _refuse(name: str, backend: Backend, module: Any, scheme: Scheme) -> None:
    """Refuse a packing that no operator supports."""
    if backend.rounds_inputs(module):
        raise ExportError(
            f"{name} ({scheme}): its {backend.name} kernel rounds its inputs too, which no float32 graph does. "
            f"{_INSTEAD} (a weight-only one)."
        )
    if "act-order" in scheme.details:
        raise ExportError(
            f"{name} ({scheme}): its columns are in act-order (desc_act, g_idx), which MatMulNBits does not support. "
            f"{_INSTEAD}, for GPTQ one with desc_act=False."
        )
    if scheme.bits not in _BITS:
        raise ExportError(
            f"{name} ({scheme}): {scheme.bits:g} bits a code, but MatMulNBits takes {', '.join(map(str, _BITS))}. "
            f"{_INSTEAD} of those."
        )
    if scheme.format in _TABLES and scheme.group_size not in BLOCKS:
        raise ExportError(
            f"{name} ({scheme}): MatMulBnb4 takes blocks of {', '.join(map(str, BLOCKS))}. {_INSTEAD} with those."
        )
    if scheme.group_size is not None and scheme.group_size % BLOCKS[0]:
        raise ExportError(
            f"{name} ({scheme}): MatMulNBits takes groups that are multiples of {BLOCKS[0]}. {_INSTEAD} with those."
        )


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes below 2^bits into bytes along the last dimension, lowest bits first."""
    each = 8 // bits
    padded = F.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    shifted = padded << torch.arange(0, 8, bits, dtype=torch.uint8)
    return shifted.sum(-1, dtype=torch.uint8)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes that `_pack` packed, with its padding."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)
