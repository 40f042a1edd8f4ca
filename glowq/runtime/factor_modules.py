"""The factors of one group as leaf modules, and its left factors as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..factors.form import BLOCK
from ..factors.integers import LEFT_UNIT, Stored
from . import operators

__all__ = ["JoinedLefts", "LeftFactor", "RightFactor", "is_watched"]


class RightFactor(nn.Module):
    """One factor as a leaf module: accelerate's offload hooks run when it is called, not when its parameter is read.

    `scale` holds the scale of each row of the factor, if it is one of whole numbers; it is None for a float factor.
    """

    factor: nn.Parameter
    scale: Tensor | None
    multipliers: Tensor | None

    def __init__(self, stored: Stored, scale: Tensor | None = None) -> None:
        super().__init__()
        self.factor = nn.Parameter(stored.values, requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_buffer("multipliers", stored.multipliers)

    def stored(self) -> Stored:
        """The factor without gradients, in the memory of this module."""
        return Stored(self.factor.detach(), self.multipliers)

    def forward(self, x: Tensor) -> Tensor:
        return operators.right(x, self.factor, self.scale, self.multipliers)


class LeftFactor(RightFactor):
    """The left factor of one member. All left factors have one unit, so that their scales are known."""

    def __init__(self, stored: Stored, width: int, scale: Tensor | None) -> None:
        super().__init__(stored, None if scale is None else scale.new_full((width,), LEFT_UNIT))

    def forward(self, x: Tensor) -> Tensor:
        return operators.left(x, self.factor, self.scale, self.multipliers)


class JoinedLefts:
    """All left factors of a group as one tensor, which has their memory, so that they can share one product.

    Args:
        factors: the left factors, in the order of the members.
        widths: width of the output of each.
    """

    def __init__(self, factors: Sequence[LeftFactor], widths: Sequence[int]) -> None:
        self._factors = tuple(factors)
        self._widths = list(widths)
        # Widths of what they compute together: factors in blocks compute whole blocks.
        in_blocks = factors[0].multipliers is not None
        self._parts = [-(-width // BLOCK) * BLOCK for width in widths] if in_blocks else self._widths
        self._found: tuple[Any, ...] = ()  # addresses of the factors, all of them as one tensor, and their buffers
        self.stack()

    def tensors(self) -> tuple[Any, ...]:
        """All factors as one tensor, the scale of every row, and the multipliers; stacked again if one has moved."""
        if torch.compiler.is_compiling():
            return torch.cat([left.factor for left in self._factors]), *self._buffers()
        if not self._found or self._found[0] != self._addresses():
            self.stack()
        return self._found[1:]

    def split(self, total: Tensor) -> tuple[Tensor, ...]:
        """Each member's part of what all factors compute together, shape (..., sum of the parts)."""
        if len(self._widths) == 1:
            parts: tuple[Tensor, ...] = (total,)
        else:
            parts = tuple(torch.split_with_sizes(total, self._parts, -1))
        if self._parts is self._widths:
            return parts
        return tuple(part[..., :width] for part, width in zip(parts, self._widths, strict=True))

    def stack(self) -> None:
        """Place the factors one after the other in memory."""
        factors = [left.factor for left in self._factors]
        whole = operators.joined(factors)
        if whole is None:
            pieces = operators.stacked([factor.data for factor in factors])
            for factor, piece in zip(factors, pieces, strict=True):
                factor.data = piece
            whole = operators.joined(factors)
        self._found = self._addresses(), whole, *self._buffers()

    def _buffers(self) -> tuple[Tensor | None, Tensor | None]:
        several = [left.multipliers for left in self._factors if left.multipliers is not None]
        scales = [left.scale for left in self._factors if left.scale is not None]
        if several:
            return scales[0].new_full((sum(self._parts),), LEFT_UNIT), torch.cat(several)
        return (torch.cat(scales) if scales else None), None

    def _addresses(self) -> list[int]:
        factors: Any = self._factors  # direct access to the parameters, because an attribute of a module is slow
        return [factor._parameters["factor"].data_ptr() for factor in factors]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": ()}


def is_watched(factor: Any) -> bool:
    """Whether a factor must be called as a module, because it has a hook."""
    state = factor.__dict__
    return bool(state["_forward_hooks"] or state["_forward_pre_hooks"] or "_hf_hook" in state)
