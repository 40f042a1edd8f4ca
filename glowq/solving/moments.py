"""The input and output moments of a group.

The output moment G of a wide group is a diagonal plus a low-rank part instead of a matrix. The low-rank part is the
Nystrom approximation Y (Omega^T Y)^+ Y^T of a random sketch Y = G Omega. Its diagonal never exceeds that of G. The
difference is added as the diagonal part, so that every diagonal entry is exact.

Source: Tropp et al. (arXiv 1706.05736) algorithm 3, with its shift nu, at the full rank of the sketch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

__all__ = ["LowRankMoment", "Moments", "OutputMoment", "of_divided_outputs"]


@dataclass(frozen=True)
class LowRankMoment:
    """A second moment G = diag(D) + U U^T that is never computed as a matrix.

    Attributes:
        diagonal: D, shape (O,), never negative, any float dtype.
        factor: U, shape (O, k), any float dtype.
    """

    diagonal: Tensor
    factor: Tensor

    def full_diagonal(self) -> Tensor:
        """The diagonal of G, shape (O,), float64."""
        return self.diagonal.double() + self.factor.double().square().sum(1)

    def rows(self, start: int, stop: int) -> LowRankMoment:
        """Return the moment of the outputs start..stop only: this block of G."""
        return LowRankMoment(self.diagonal[start:stop], self.factor[start:stop])


OutputMoment = Tensor | LowRankMoment
"""Second moment G of the loss gradient at a group's stacked outputs: a matrix (O, O), its diagonal (O,), or a diagonal
plus a low-rank part."""


def of_divided_outputs(moment: OutputMoment, rows: Tensor) -> OutputMoment:
    """The moment of the gradient at y / t, from that at the outputs y: each gradient is multiplied by t.

    Args:
        moment: see `OutputMoment`.
        rows: t, shape (O,), positive.
    """
    if isinstance(moment, LowRankMoment):
        scale = rows.to(moment.diagonal)
        return LowRankMoment(moment.diagonal * scale.square(), moment.factor * scale[:, None])
    scale = rows.to(moment)
    return moment * (scale.square() if moment.ndim == 1 else scale[:, None] * scale)


@dataclass(frozen=True)
class Moments:
    """The moments of one group with input x of width d, from calibration. What the method does not need is None.

    Attributes:
        tokens: number of tokens counted, padding excluded.
        second: second moment S = E[x x^T], shape (d, d), float64; None if `energy` was summed instead.
        energy: output error E S E^T of the stacked members, shape (O, O), float64; None if `second` was summed.
        mean_square: tr(S) / d, the mean of E[x_i^2] over the channels, shape (), float64; with `second` or `energy`.
        magnitude: LQER's mean |x_i|: the mean over each sequence, then the largest over sequences, shape (d,), float64.
        output: second moment G of the loss gradient at the stacked outputs, shape (O, O), or its diagonal, shape (O,),
            or a diagonal plus a low-rank part, float32, see `glowq.calibration.output_gradients`.
    """

    tokens: int
    second: Tensor | None = None
    energy: Tensor | None = None
    mean_square: Tensor | None = None
    magnitude: Tensor | None = None
    output: OutputMoment | None = None

    def rows(self, start: int, stop: int) -> Moments:
        """Return the moments for the stacked output rows start..stop only (one member of the group)."""
        if self.energy is None and self.output is None:
            return self
        energy = None if self.energy is None else self.energy[start:stop, start:stop]
        return replace(self, energy=energy, output=_rows(self.output, start, stop))


def _rows(output: OutputMoment | None, start: int, stop: int) -> OutputMoment | None:
    if isinstance(output, LowRankMoment):
        return output.rows(start, stop)
    return None if output is None else output[(slice(start, stop),) * output.ndim]
