"""Samples of any modality: the keyword arguments of one forward each; and batches of samples, or of token ids."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import CalibrationError, ConfigError

__all__ = ["Inputs", "Samples", "SomeSamples", "batches", "rows_of_samples", "size_of", "split"]


@dataclass(frozen=True)
class Inputs:
    """Samples that a model can be run on. It is used as a tensor of token ids is: one row per sample.

    Attributes:
        samples: keyword arguments of one forward each, with a batch dimension of 1. They hold no padding.
        length: the most rows that one sample gives a linear layer: tokens, patches of an image, frames of a sound.
        in_batches: whether several samples can be run as one batch, with an answer for each.
    """

    samples: tuple[Mapping[str, Tensor], ...]
    length: int = 1
    in_batches: bool = True

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Inputs:
        """Samples by a slice, by a list of numbers, or by a mask of shape (n,)."""
        if isinstance(index, slice):
            return replace(self, samples=self.samples[index])
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            index = index.nonzero().flatten().tolist()
        return replace(self, samples=tuple(self.samples[number] for number in index))

    @property
    def shape(self) -> tuple[int, int]:
        """Number of samples, and `length`."""
        return len(self.samples), self.length

    def numel(self) -> int:
        """Number of rows of all samples together."""
        return len(self.samples) * self.length

    def split(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Batches of at most `size` samples in their order; samples of other shapes start a new batch."""
        batch: list[Mapping[str, Tensor]] = []
        for sample in self.samples:
            if batch and (len(batch) == size or not self.in_batches or _shapes(batch[0]) != _shapes(sample)):
                yield _joined(batch)
                batch = []
            batch.append(sample)
        if batch:
            yield _joined(batch)


Samples = Tensor | Inputs
"""Token ids, shape (n, length), int64, or samples of another kind."""

SomeSamples = TypeVar("SomeSamples", Tensor, Inputs, Samples)
"""Samples of one kind, which a function returns as it takes them."""


def size_of(batch: Mapping[str, Tensor]) -> int:
    """Number of samples in a batch: the arguments of one forward. Some models take several images for one text."""
    return len(batch["input_ids"] if "input_ids" in batch else next(iter(batch.values())))


def rows_of_samples(values: Tensor, batch: Mapping[str, Tensor], samples: Samples) -> Tensor:
    """Values of a batch's tokens, or of its samples, with one row for each sample.

    Args:
        values: shape (batch * n,), in the order of the samples.
        batch: what they were computed of.
        samples: what the batch is a part of.

    Returns:
        Shape (batch, n); or the mean of each sample, (batch, 1), for samples that have no common length.
    """
    rows = values.reshape(size_of(batch), -1)
    return rows.mean(1, keepdim=True) if isinstance(samples, Inputs) else rows


def batches(sequences: Samples, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Yield model inputs of `batch_size` sequences; the last batch may be smaller.

    Args:
        sequences: token ids, shape (n, length), int64; or samples of another kind, of which those of other shapes start
            a new batch.
        batch_size: sequences in a batch, at least 1.

    Yields:
        {"input_ids", "attention_mask"}, both shape (b, length), int64, b <= batch_size; the mask is all ones. For
        samples of another kind, their fields.

    Raises:
        ConfigError: batch_size is below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, found {batch_size}")
    if isinstance(sequences, Inputs):
        yield from sequences.split(batch_size)
        return
    for input_ids in sequences.split(batch_size):
        yield {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def split(sequences: SomeSamples, fraction: float, seed: int = 0) -> tuple[SomeSamples, SomeSamples]:
    """Split sequences at random into those to calibrate on and those to measure on. Both parts keep the order.

    Args:
        sequences: token ids, shape (n, length), n >= 2, or as many samples of another kind.
        fraction: share to hold out, 0 < fraction < 1. It is rounded to whole sequences, at least one in each part.
        seed: seed of the choice of held-out sequences.

    Returns:
        (train, held_out), shapes (n - h, length) and (h, length): disjoint rows of `sequences`.

    Raises:
        ConfigError: fraction is outside (0, 1).
        CalibrationError: fewer than two sequences.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"the held-out fraction must lie between 0 and 1, found {fraction}")
    count = len(sequences)
    if count < 2:
        raise CalibrationError(
            f"needed 2 sequences to hold one out, found {count}: give at least {2 * sequences.shape[1]} tokens, or "
            f"take shorter sequences than {sequences.shape[1]}"
            if isinstance(sequences, Tensor)
            else f"needed 2 samples to hold one out, found {count}: give more"
        )
    held = torch.zeros(count, dtype=torch.bool)
    held[random.Random(seed).sample(range(count), min(max(1, round(count * fraction)), count - 1))] = True
    return sequences[~held], sequences[held]


def _shapes(sample: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in sample.items()}


def _joined(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
