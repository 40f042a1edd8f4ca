"""Find text that is in both the calibration text and the report text, by comparing windows of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import EvaluationError

__all__ = ["WINDOW", "Overlap", "check_disjoint", "find_overlap"]

WINDOW = 64  # tokens; licences and import lists that many files share are shorter
_MULTIPLIER = 0x5851F42D4C957F2D  # odd and large, so that every token changes the high bits of the hash


@dataclass(frozen=True)
class Overlap:
    """The overlap of a report text with a calibration text.

    Attributes:
        window: number of tokens of a window. Windows start at every offset.
        windows: number of windows of the report text that are also in the calibration text.
        of: number of windows of the report text.
        sequences: number of sequences of the report text that hold such a window.
    """

    window: int
    windows: int
    of: int
    sequences: int


def find_overlap(calibration: Tensor, report: Tensor, window: int = WINDOW) -> Overlap:
    """Count the windows of `report` that occur in `calibration`, at any offset of either.

    Args:
        calibration: token ids, shape (n, length), int64.
        report: token ids, shape (m, length), int64.
        window: number of tokens in a row that must be equal; lowered to the length of the sequences.
    """
    window = min(window, calibration.shape[1], report.shape[1])
    hashes = _window_hashes(report, window)
    shared = torch.isin(hashes, _window_hashes(calibration, window))
    return Overlap(window, int(shared.sum()), shared.numel(), int(shared.any(1).sum()))


def check_disjoint(calibration: Tensor, report: Tensor, *, force: bool = False) -> Overlap:
    """Raise an error if the report text overlaps the calibration text.

    Args:
        calibration: token ids, shape (n, length), int64.
        report: token ids, shape (m, length), int64.
        force: only measure the overlap, and raise no error.

    Raises:
        EvaluationError: a window of `report` is also in `calibration`.
    """
    found = find_overlap(calibration, report)
    if found.windows and not force:
        raise EvaluationError(
            f"the report text overlaps the calibration text: {found.windows / found.of:.1%} of its windows of "
            f"{found.window} tokens, in {found.sequences} of {len(report)} sequences, were calibrated on, so that its "
            "figures would be too good for every correction. Give other --data, or --force to measure nevertheless."
        )
    return found


def _window_hashes(sequences: Tensor, window: int) -> Tensor:
    """A 64-bit polynomial hash of every window, shape (n, length - window + 1); the overflow of int64 is intended."""
    count = sequences.shape[1] - window + 1
    hashes = torch.zeros(sequences.shape[0], count, dtype=torch.int64)
    for offset in range(window):
        hashes = hashes * _MULTIPLIER + sequences[:, offset : offset + count] + 1
    return hashes
