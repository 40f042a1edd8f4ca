"""Sums over tokens of the products of output gradients: the whole matrix, or a sketch of a wide one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..solving.moments import LowRankMoment

__all__ = ["SKETCH_RANK", "GradientProduct", "GradientSketch"]

SKETCH_RANK = 256  # directions of a wide moment that are kept
_NOISE = 8.0  # roundings of its largest singular value that the sums of a sketch are off by, at most


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


_COLUMNS = 128  # of a symmetric product computed at a time: what lies below the diagonal is left out


class GradientProduct:
    """Adds up g g^T of O outputs, in float32: a matrix a group is held until the walk is over.

    Of a symmetric matrix, only the blocks on and right of the diagonal are computed.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros(width, width, device=device)

    def add(self, rows: Tensor) -> None:
        """Count one gradient a row, shape (tokens, O)."""
        single = rows.float()
        for start in range(0, single.shape[1], _COLUMNS):
            block = slice(start, start + _COLUMNS)
            self._sum[block, start:].addmm_(single[:, block].T, single[:, start:])

    @property
    def diagonal(self) -> Tensor:
        """Sum of the squares, shape (O,)."""
        return self._sum.diagonal()

    def moment(self, tokens: int) -> Tensor:
        """The mean over `tokens` of what was counted, shape (O, O): what holds the sum becomes it."""
        for start in range(0, len(self._sum), _COLUMNS):
            stop = start + _COLUMNS
            self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
        return self._sum.div_(tokens)
