"""Input moments of a group, summed over calibration tokens.

Source: GlowQ (arXiv 2603.25385) sec. 3 for the uncentred second moment of the shared input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, NonFiniteError
from ..factors.group import Group
from ..solving.moments import Moments
from ..solving.scaling import near_one

__all__ = ["Feed", "MomentCollector", "collecting"]

_BROKEN = "The reference itself is broken: check that it generates, or load it in another dtype."


class MomentCollector:
    """Computes the input moments of one group from the inputs of its first member.

    Args:
        group: the group. Every call of its first member counts: a module that is called twice counts twice.
        statistic: the statistic that the method needs: "second" or "magnitude".
        error: stacked weight error E, shape (O, d), float32. Give it if O < d, to sum E S E^T, shape (O, O), instead of
            S, shape (d, d).
        divisor: what the inputs are divided by, shape (d,): the scales that a quantizer folded into the layer before.
    """

    def __init__(
        self, group: Group, statistic: str, error: Tensor | None = None, divisor: Tensor | None = None
    ) -> None:
        self.group = group
        self.divisor = divisor
        self.error = error
        self.tokens = 0
        self._update = self._add_magnitude if statistic == "magnitude" else self._add_second
        self._matrix: Tensor | None = None
        self._square: Tensor | None = None
        self._magnitude: Tensor | None = None

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add one input to the moments.

        Args:
            x: the group's input, shape (..., d), any float dtype.
            mask: 1 or True for each token that counts, shape (batch, length). It is ignored if `x` does not have one
                row per token.
        """
        sequences = x.detach().reshape(1, -1, x.shape[-1]) if x.dim() < 3 else x.detach().flatten(1, -2)
        if self.divisor is not None:
            sequences = sequences / self.divisor.to(sequences)
        keep = _token_mask(sequences, mask)
        self.tokens += sequences.shape[0] * sequences.shape[1] if keep is None else int(keep.sum())
        self._update(sequences, keep)

    def _add_second(self, sequences: Tensor, keep: Tensor | None) -> None:
        rows = sequences.flatten(0, 1) if keep is None else sequences[keep]
        seen, power = near_one(rows.to(torch.float32))
        if self.error is not None:
            square = torch.linalg.vector_norm(seen).to(torch.float64).square() / power**2
            self._square = square if self._square is None else self._square.add_(square)
            seen, more = near_one(seen @ self.error.to(rows.device).T)
            power *= more
        # Products are in float32 and sums over batches in float64, so that long calibrations lose no accuracy.
        product = (seen.T @ seen).to(torch.float64) / power**2
        self._matrix = product if self._matrix is None else self._matrix.add_(product)

    def _add_magnitude(self, sequences: Tensor, keep: Tensor | None) -> None:
        magnitude = _sequence_magnitude(sequences, keep)
        self._magnitude = magnitude if self._magnitude is None else torch.maximum(self._magnitude, magnitude)

    def moments(self) -> Moments:
        """Return the moments over all tokens that were counted.

        Raises:
            CalibrationError: no token reached the group.
            NonFiniteError: an input held NaN or Inf.
        """
        where = self.group.members[0]
        streamed = [sums for sums in (self._matrix, self._square, self._magnitude) if sums is not None]
        if self.tokens == 0 or not streamed:
            raise CalibrationError(f"{where}: no calibration token reached this module; give longer text.")
        if not all(bool(torch.isfinite(sums).all()) for sums in streamed):
            raise NonFiniteError(f"{where}: its input holds NaN or Inf during calibration. {_BROKEN}")
        if self._matrix is None:
            return Moments(self.tokens, magnitude=self._magnitude)
        matrix = self._matrix / self.tokens
        if self._square is None:
            return Moments(self.tokens, second=matrix, mean_square=matrix.diagonal().mean())
        return Moments(self.tokens, energy=matrix, mean_square=self._square / self.tokens / self.group.in_features)


@dataclass
class Feed:
    """The attention mask of the batch that is running, or None, for the hooks of the collectors."""

    mask: Tensor | None = None


@contextmanager
def collecting(model: nn.Module, collectors: Sequence[MomentCollector]) -> Iterator[Feed]:
    """Inside this context, every forward of `model` updates the collectors; the hooks are always removed at the end."""
    feed = Feed()
    with ExitStack() as stack:
        for collector in collectors:
            member = model.get_submodule(collector.group.members[0])
            handle = member.register_forward_pre_hook(_hook(collector, feed))
            stack.callback(handle.remove)
        yield feed


def _hook(collector: MomentCollector, feed: Feed) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        collector.update(args[0], feed.mask)

    return hook


def _token_mask(sequences: Tensor, mask: Tensor | None) -> Tensor | None:
    if mask is None or mask.numel() != sequences.shape[0] * sequences.shape[1]:
        return None  # the rows are not the tokens of the mask: image patches, the encoder's output in a decoder
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
