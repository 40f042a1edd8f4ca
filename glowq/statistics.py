"""Input moments of a group, streamed over calibration tokens.

Source: method.md notation; GlowQ (arXiv 2603.25385) sec. 3 for the uncentred second moment of the shared input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CalibrationError, NonFiniteError
from .groups import Group

__all__ = ["Feed", "MomentCollector", "Moments", "collecting"]


@dataclass(frozen=True)
class Moments:
    """What calibration measured of one group's input x (width d).

    Attributes:
        tokens: number of tokens counted, padding excluded.
        mean_square: E[x_i^2], shape (d,), float64: the diagonal of S.
        magnitude: LQER's mean |x_i| (per sequence, then the largest over sequences), shape (d,), float64.
        second: second moment S = E[x x^T], shape (d, d), float64; None where `energy` was streamed instead.
        energy: output error E S E^T of the stacked members, shape (O, O), float64; None where `second` was streamed.
    """

    tokens: int
    mean_square: Tensor
    magnitude: Tensor
    second: Tensor | None = None
    energy: Tensor | None = None

    def rows(self, start: int, stop: int) -> Moments:
        """The same input seen by the stacked output rows start..stop alone (one member of the group)."""
        if self.energy is None:
            return self
        return replace(self, energy=self.energy[start:stop, start:stop])

    @classmethod
    def unmeasured(cls, width: int) -> Moments:
        """For methods that look at the weights alone: no token was counted."""
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))


class MomentCollector:
    """Streams one group's moments from the inputs of its first member.

    Args:
        group: the group; every call of its first member counts, so that modules called twice count twice.
        statistic: what the method needs: "second" streams S (or E S E^T where `error` is given), "magnitude" and
            "none" only the vectors.
        error: stacked weight error E, shape (O, d), float32; given where O < d, so that an (O, O) energy is kept
            instead of a (d, d) moment.
    """

    def __init__(self, group: Group, statistic: str, error: Tensor | None = None) -> None:
        self.group = group
        self.statistic = statistic
        self.error = error
        self.tokens = 0
        self._square: Tensor | None = None
        self._magnitude: Tensor | None = None
        self._matrix: Tensor | None = None

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Count one input.

        Args:
            x: the group's input, shape (..., d), any float dtype.
            mask: which tokens count, shape (batch, length), 1 or True; ignored where x is not one row a token.
        """
        sequences = x.detach().reshape(1, -1, x.shape[-1]) if x.dim() < 3 else x.detach().flatten(1, -2)
        keep = _token_mask(sequences, mask)
        magnitude = _sequence_magnitude(sequences, keep)
        rows = (sequences.flatten(0, 1) if keep is None else sequences[keep]).to(torch.float32)
        self.tokens += rows.shape[0]
        self._magnitude = magnitude if self._magnitude is None else torch.maximum(self._magnitude, magnitude)
        square = rows.square().sum(0).to(torch.float64)
        self._square = square if self._square is None else self._square.add_(square)
        if self.statistic == "second":
            seen = rows if self.error is None else rows @ self.error.to(rows.device).T
            # Products in float32, sums over batches in float64: long calibrations lose no digits.
            product = (seen.T @ seen).to(torch.float64)
            self._matrix = product if self._matrix is None else self._matrix.add_(product)

    def moments(self) -> Moments:
        """The means over all tokens counted.

        Raises:
            CalibrationError: no token reached the group.
            NonFiniteError: an input held NaN or Inf.
        """
        where = self.group.members[0]
        if self.tokens == 0 or self._square is None or self._magnitude is None:
            raise CalibrationError(f"{where}: no calibration token reached this module; give longer text.")
        if not bool(torch.isfinite(self._square).all()):
            raise NonFiniteError(
                f"{where}: its input holds NaN or Inf during calibration. The quantized model itself is broken "
                "there: check that it generates, or quantize it in another dtype."
            )
        matrix = None if self._matrix is None else self._matrix / self.tokens
        return Moments(
            tokens=self.tokens,
            mean_square=self._square / self.tokens,
            magnitude=self._magnitude,
            second=matrix if self.error is None else None,
            energy=None if self.error is None else matrix,
        )


@dataclass
class Feed:
    """The open tap between a model and its collectors; `mask` is the attention mask of the batch that is running."""

    mask: Tensor | None = None


@contextmanager
def collecting(model: nn.Module, collectors: Sequence[MomentCollector]) -> Iterator[Feed]:
    """Inside this context every forward of `model` feeds the collectors; the hooks go, exceptions or not."""
    feed = Feed()
    with ExitStack() as stack:
        for collector in collectors:
            member = model.get_submodule(collector.group.members[0])
            handle = member.register_forward_pre_hook(_tap(collector, feed))
            stack.callback(handle.remove)
        yield feed


def _tap(collector: MomentCollector, feed: Feed) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        collector.update(args[0], feed.mask)

    return hook


def _token_mask(sequences: Tensor, mask: Tensor | None) -> Tensor | None:
    if mask is None or mask.numel() != sequences.shape[0] * sequences.shape[1]:
        return None  # not one row a token: image patches, the encoder's output in a decoder
    keep = mask.to(device=sequences.device, dtype=torch.bool).reshape(sequences.shape[:2])
    return None if bool(keep.all()) else keep


def _sequence_magnitude(sequences: Tensor, keep: Tensor | None) -> Tensor:
    absolute = sequences.abs().to(torch.float32)
    if keep is None:
        per_sequence = absolute.mean(1)
    else:
        counts = keep.sum(1, keepdim=True).clamp_min(1)
        per_sequence = absolute.masked_fill(~keep.unsqueeze(-1), 0).sum(1) / counts
    return per_sequence.amax(0).to(torch.float64)
