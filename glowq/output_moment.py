"""The second moment of wide gradients, streamed as a diagonal plus a low-rank part instead of a matrix.

The low-rank part is the Nystrom approximation Y (Omega^T Y)^+ Y^T of a random sketch Y = G Omega. It never exceeds G,
so what is missing from the diagonal is never negative and is added back: every diagonal entry is exact.

Source: Tropp et al. (arXiv 1706.05736) algorithm 3, with its shift nu, at the full rank of the sketch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SKETCH_RANK", "GradientSketch", "LowRankMoment", "OutputMoment"]

SKETCH_RANK = 256  # directions of a wide moment that are kept
_NOISE = 8.0  # roundings of its largest singular value that the sums of a sketch are off by, at most


@dataclass(frozen=True)
class LowRankMoment:
    """A second moment G = diag(D) + U U^T that is never written out.

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
        """The moment of the outputs start..stop alone: the same block of G."""
        return LowRankMoment(self.diagonal[start:stop], self.factor[start:stop])


OutputMoment = Tensor | LowRankMoment
"""Second moment G of the loss gradient at a group's stacked outputs: a matrix (O, O), its diagonal (O,), or that plus a
low-rank part."""


class GradientSketch:
    """Adds up gradients of O outputs in O k numbers, in one pass.

    Args:
        width: number of outputs O.
        rank: columns k of the sketch; O where that is smaller, which makes the moment exact.
        seed: of the random directions, the same on every device.
        device: where the gradients are.

    Attributes:
        diagonal: sum of the squares of what was counted, shape (O,), float32.
    """

    def __init__(self, width: int, rank: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(width, min(rank, width), generator=generator)
        self._directions = torch.linalg.qr(directions)[0].to(device)  # orthonormal: the same range, better conditioned
        self._image = torch.zeros_like(self._directions)
        self.diagonal = self._image.new_zeros(width)

    def add(self, rows: Tensor) -> None:
        """Count one gradient a row.

        Args:
            rows: shape (tokens, O), any float dtype.
        """
        single = rows.float()
        self.diagonal += single.square().sum(0)
        self._image.addmm_(single.T, single @ self._directions)

    def moment(self, tokens: int) -> LowRankMoment:
        """The mean over `tokens` of what was counted, float32.

        Its diagonal is exact to float32, and so is all of it where the gradients span at most k directions.
        """
        image, directions = self._image.double() / tokens, self._directions.double()
        diagonal = self.diagonal.double() / tokens
        # The shift keeps the square root below away from what float32 sums cannot tell from zero.
        largest = float(torch.linalg.eigvalsh(image.T @ image)[-1].clamp_min(0).sqrt())
        shift = _NOISE * torch.finfo(self._image.dtype).eps * largest
        image = image + shift * directions
        core = directions.T @ image
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        kept = values > shift / 2
        root = image @ (vectors[:, kept] / values[kept].sqrt())
        squares, vectors = torch.linalg.eigh(root.T @ root)
        # root root^T approximates G + shift: its eigenvalues are the squares, and the shift comes off again.
        factor = root @ (vectors * (1 - shift / squares.clamp_min(shift)).clamp_min(0).sqrt())
        rest = (diagonal - factor.square().sum(1)).clamp_min(0)
        return LowRankMoment(rest.float(), factor.float())
