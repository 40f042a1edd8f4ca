"""Input moments of random inputs with one large channel."""

from __future__ import annotations

import torch
from torch import Tensor

from glowq.solving.moments import Moments


def measured(outputs: int = 20, inputs: int = 32) -> tuple[Tensor, Moments]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x[:, 3] *= 10
    error = torch.rand(outputs, inputs, generator=generator) - 0.5
    second = x.T @ x / len(x)
    return error, Moments(len(x), second, None, second.diagonal().mean(), x.abs().mean(0))
