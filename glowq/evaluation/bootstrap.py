"""Percentile bootstrap over sequences, paired."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Interval", "bootstrap"]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95% percentile-bootstrap interval over sequences."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap(
    statistic: Callable[[Tensor], Tensor], columns: Tensor, *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap over sequences, all columns resampled together (paired).

    Args:
        statistic: means of the columns, shape (..., k) -> figure, shape (...).
        columns: one row a sequence, shape (n, k), float64.
        resamples: how often n rows are drawn with replacement.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    count = columns.shape[0]
    rows = torch.randint(count, (resamples, count), generator=generator)
    draws = statistic(columns[rows].mean(1))
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return Interval(float(statistic(columns.mean(0))), low, high)
