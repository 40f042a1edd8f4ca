"""Errors and inputs for the solver, with the least error that any correction can leave, by dense float64 algebra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glowq.solving.low_rank import Factors


@dataclass(frozen=True)
class Case:
    """A weight error E, shape (O, d), float32, and inputs X, shape (tokens, d), float64, scaled so that S = X^T X."""

    error: Tensor
    inputs: Tensor

    @property
    def moment(self) -> Tensor:
        return self.inputs.T @ self.inputs

    @property
    def outputs(self) -> Tensor:
        """E X^T, shape (O, tokens): its squared norm is the error of the outputs. It needs no root of S."""
        return self.error.double() @ self.inputs.T

    @property
    def energy(self) -> Tensor:
        return self.outputs @ self.outputs.T

    def values(self) -> Tensor:
        """The error that each rank can remove, shape (min(O, tokens),), descending."""
        return torch.linalg.svdvals(self.outputs).square()

    def rest(self, factors: Factors) -> Tensor:
        """The error that a correction leaves in each output, shape (O,)."""
        given = factors.left.double() @ (factors.right.double() @ self.inputs.T)
        return (self.outputs - given).square().sum(1)


def case(outputs: int, inputs: int, *, tokens: int = 2048, seed: int = 0) -> Case:
    """An error like that of rounding, and correlated inputs with two outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, inputs + 1, dtype=torch.float64).pow(-0.5)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) * decay
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    x[:, :2] *= 20
    error = torch.rand(outputs, inputs, generator=generator) - 0.5
    return Case(error * torch.exp(0.5 * torch.randn(outputs, 1, generator=generator)), x / tokens**0.5)


def bound(samples: Sequence[float]) -> float:
    """Mean + 7 standard deviations: what no further sample exceeds."""
    found = torch.tensor(samples, dtype=torch.float64)
    return float(found.mean() + 7 * found.std())
