"""The square root of an output moment, in the same form as the moment."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .moments import LowRankMoment, OutputMoment

__all__ = ["OutputRoot"]


@dataclass(frozen=True)
class OutputRoot:
    """A matrix L with L L^T = G + damping * (mean diagonal of G) * I; the identity if every attribute is None.

    If G is a matrix, L is `triangle`. Otherwise L is diag(scale) (I + Q diag(s) Q^T).

    Attributes:
        triangle: L as a lower triangular matrix, shape (O, O).
        scale: shape (O,).
        frame: Q, orthonormal columns, shape (O, k), if G has a low-rank part.
        stretch: s, shape (k,).
    """

    triangle: Tensor | None = None
    scale: Tensor | None = None
    frame: Tensor | None = None
    stretch: Tensor | None = None

    @staticmethod
    def of(moment: OutputMoment, unit: float, damping: float) -> OutputRoot:
        """Compute the root of `unit` * G with damping, in float64.

        Args:
            moment: G, shape (O, O), its diagonal, shape (O,), or a diagonal plus a low-rank part; not zero.
            unit: factor that brings G near 1.
            damping: share of G's mean diagonal that is added to its diagonal, > 0.
        """
        if isinstance(moment, LowRankMoment):
            scale = (moment.diagonal.double() * unit + damping * unit * moment.full_diagonal().mean()).sqrt()
            return _low_rank(scale, moment.factor.double() * unit**0.5)
        scaled = moment.double() * unit
        if scaled.ndim == 1:
            return OutputRoot(scale=(scaled + damping * scaled.mean()).sqrt())
        extra = damping * scaled.diagonal().mean()
        return OutputRoot(torch.linalg.cholesky(scaled + extra.expand(scaled.shape[0]).diag()))

    def to(self, dtype: torch.dtype) -> OutputRoot:
        """Return the same root in another dtype."""
        given = {name: value.to(dtype) for name, value in vars(self).items() if value is not None}
        return replace(self, **given)

    def apply(self, block: Tensor) -> Tensor:
        """Return L X, shape (O, b), for X (O, b) of the root's dtype."""
        if self.triangle is not None:
            return self.triangle @ block
        return self._scaled(self._stretched(block))

    def apply_transposed(self, block: Tensor) -> Tensor:
        """Return L^T X, shape (O, b), for X (O, b) of the root's dtype."""
        if self.triangle is not None:
            return self.triangle.T @ block
        return self._stretched(self._scaled(block))

    def _scaled(self, block: Tensor) -> Tensor:
        return block if self.scale is None else self.scale[:, None] * block

    def _stretched(self, block: Tensor) -> Tensor:
        if self.frame is None or self.stretch is None:
            return block
        return block + self.frame @ (self.stretch[:, None] * (self.frame.T @ block))


def _low_rank(scale: Tensor, factor: Tensor) -> OutputRoot:
    """Compute the root of diag(scale^2) + U U^T.

    With W = diag(scale)^-1 U = Q diag(w) R^T, I + W W^T is the square of I + Q diag(sqrt(1 + w^2) - 1) Q^T.
    """
    frame, spread, _ = torch.linalg.svd(factor / scale[:, None], full_matrices=False)
    squares = spread.square()
    stretch = squares / ((1 + squares).sqrt() + 1)  # sqrt(1 + w^2) - 1 without the cancellation
    return OutputRoot(scale=scale, frame=frame, stretch=stretch)
