"""Sums of g g^T over tokens, g being the gradient at a group's outputs: as a matrix, or as a sketch if it is wide."""

from __future__ import annotations

import torch
from torch import Tensor

from ..solving.moments import LowRankMoment

__all__ = ["SKETCH_RANK", "GradientProduct", "GradientSketch"]

SKETCH_RANK = 256  # directions that the sketch of a wide moment keeps
_NOISE = 8.0  # bound on the rounding error of a sketch's sums, in units of eps times its largest singular value


class GradientSketch:
    """Sums g g^T over gradients g of O outputs, in one pass and with O k numbers instead of O^2.

    Args:
        width: number of outputs O.
        rank: number of columns k of the sketch. If O is smaller, k is O and the moment is exact.
        seed: seed of the random directions, which are the same on every device.
        device: device of the gradients.

    Attributes:
        diagonal: sum of the squares of the gradients, shape (O,), float32.
    """

    def __init__(self, width: int, rank: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(width, min(rank, width), generator=generator)
        self._directions = torch.linalg.qr(directions)[0].to(device)  # orthonormal: same range, better conditioned
        self._image = torch.zeros_like(self._directions)
        self.diagonal = self._image.new_zeros(width)

    def add(self, rows: Tensor) -> None:
        """Add gradients to the sums.

        Args:
            rows: one gradient per row, shape (tokens, O), any float dtype.
        """
        single = rows.float()
        self.diagonal += single.square().sum(0)
        self._image.addmm_(single.T, single @ self._directions)

    def moment(self, tokens: int) -> LowRankMoment:
        """Return the mean of g g^T over `tokens` tokens, float32.

        Its diagonal is exact up to rounding to float32. So is the whole moment if the gradients span at most k
        directions.
        """
        image, directions = self._image.double() / tokens, self._directions.double()
        diagonal = self.diagonal.double() / tokens
        # The square root below needs eigenvalues above the rounding error of the float32 sums: the shift ensures this.
        largest = float(torch.linalg.eigvalsh(image.T @ image)[-1].clamp_min(0).sqrt())
        shift = _NOISE * torch.finfo(self._image.dtype).eps * largest
        image = image + shift * directions
        core = directions.T @ image
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        kept = values > shift / 2
        root = image @ (vectors[:, kept] / values[kept].sqrt())
        squares, vectors = torch.linalg.eigh(root.T @ root)
        # root root^T approximates G + shift I. Its eigenvalues are `squares`; the shift is subtracted from them.
        factor = root @ (vectors * (1 - shift / squares.clamp_min(shift)).clamp_min(0).sqrt())
        rest = (diagonal - factor.square().sum(1)).clamp_min(0)
        return LowRankMoment(rest.float(), factor.float())


_COLUMNS = 128  # width of the blocks in which a symmetric product is computed; blocks below the diagonal are skipped


class GradientProduct:
    """Sums g g^T over gradients g of O outputs in float32; every group holds such a matrix until the last batch.

    The matrix is symmetric: only the blocks on the diagonal and right of it are computed.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros(width, width, device=device)

    def add(self, rows: Tensor) -> None:
        """Add gradients, one per row, shape (tokens, O)."""
        single = rows.float()
        for start in range(0, single.shape[1], _COLUMNS):
            block = slice(start, start + _COLUMNS)
            self._sum[block, start:].addmm_(single[:, block].T, single[:, start:])

    @property
    def diagonal(self) -> Tensor:
        """Sum of the squares of the gradients, shape (O,)."""
        return self._sum.diagonal()

    def moment(self, tokens: int) -> Tensor:
        """Return the mean of g g^T over `tokens` tokens, shape (O, O), computed in place of the sum."""
        for start in range(0, len(self._sum), _COLUMNS):
            stop = start + _COLUMNS
            self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
        return self._sum.div_(tokens)
