"""Read token ids that a user gives in place of text: a tensor, an array, a tokenizer's result, or a data set of ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationError, TokenizerMismatchError

__all__ = ["holds_ids", "id_sequences"]


def holds_ids(source: Any) -> bool:
    """Whether a source is token ids, not text: a tensor, an array of numbers, or a mapping or table with input_ids."""
    if isinstance(source, Tensor):
        return True
    if isinstance(source, np.ndarray):
        return source.dtype.kind not in "OSU"
    columns = source if isinstance(source, Mapping) else getattr(source, "column_names", None)
    return isinstance(columns, Mapping | list) and "input_ids" in columns and hasattr(source, "__getitem__")


def id_sequences(source: Any, *, vocab_size: int | None = None, positions: int | None = None) -> Tensor:
    """Check token ids, leave out padding, and return sequences of one length.

    Sequences that all have the same length are returned as they are. Sequences of different lengths are joined in their
    order, without a separator, and cut into sequences of one length, at most that of the longest; fewer tokens than
    there are sequences are dropped at the end.

    Args:
        source: one of the sources of `holds_ids`: integers of any kind, shape (n, length) or (length,), or lists of
            them. Where a mapping or table also holds "attention_mask", tokens with 0 in it are left out. Its other
            entries are ignored.
        vocab_size: number of rows of the model's embedding; None checks no upper bound.
        positions: most tokens of a sequence that the model has positions for; None if there is no limit.

    Returns:
        Token ids, shape (n, length), int64, on the CPU, n >= 1.

    Raises:
        CalibrationError: the ids are not whole numbers of these shapes, or negative; the mask does not fit; no token is
            left; or a sequence is longer than `positions`.
        TokenizerMismatchError: an id has no row in the model's embedding.
    """
    rows = [row for row in _kept(source) if row.numel()]
    if not rows:
        raise CalibrationError(
            "the calibration token ids hold no token (padding is left out); give at least one sequence."
        )
    stream = torch.cat(rows)
    _check_range(stream, vocab_size)
    longest = max(row.numel() for row in rows)
    if positions is not None and longest > positions:
        raise CalibrationError(
            f"a calibration sequence has {longest} tokens, and the model has positions for {positions}; cut it, for "
            f"example with tokenizer(text, truncation=True, max_length={positions}), or give the text itself, which is "
            "cut to the right length."
        )
    count = -(-stream.numel() // longest)
    length = stream.numel() // count
    return stream[: count * length].view(count, length)


def _kept(source: Any) -> list[Tensor]:
    """The sequences without the tokens that the attention mask leaves out, each of shape (tokens,), int64."""
    if isinstance(source, Tensor | np.ndarray):
        return _sequences("calibration token ids", source)
    found = _sequences("input_ids", source["input_ids"])
    columns = source if isinstance(source, Mapping) else source.column_names
    if "attention_mask" not in columns or source["attention_mask"] is None:
        return found
    masks = _sequences("attention_mask", source["attention_mask"])
    if [row.shape for row in masks] != [row.shape for row in found]:
        raise CalibrationError("attention_mask must have one number for each of input_ids, found another shape.")
    if masks and not bool(torch.isin(torch.cat(masks), torch.tensor([0, 1])).all()):
        raise CalibrationError("attention_mask must hold 1 for a token and 0 for padding, found other numbers.")
    return [row[mask == 1] for row, mask in zip(found, masks, strict=True)]


def _sequences(name: str, value: Any) -> list[Tensor]:
    """The rows of a matrix or of a list of lists; one row if it is a list of numbers."""
    if not isinstance(value, Tensor | np.ndarray):
        value = _listed(name, value)
        if any(isinstance(row, Tensor | np.ndarray | Sequence) for row in value):
            return [_row(name, row) for row in value]
    whole = _whole(name, value)
    if whole.dim() not in (1, 2):
        raise CalibrationError(_misshaped(name, f"{whole.dtype} of shape {tuple(whole.shape)}"))
    return [whole] if whole.dim() == 1 else list(whole)


def _row(name: str, value: Any) -> Tensor:
    row = _whole(name, value)
    if row.dim() != 1:
        raise CalibrationError(_misshaped(name, f"a sequence of shape {tuple(row.shape)}"))
    return row


def _whole(name: str, value: Any) -> Tensor:
    """An int64 tensor on the CPU; masks may also be bool."""
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CalibrationError(_misshaped(name, f"{type(value).__name__} that holds something else")) from error
    is_mask = name == "attention_mask" and tensor.dtype == torch.bool
    if tensor.numel() and not is_mask and (tensor.dtype == torch.bool or tensor.dtype.is_floating_point):
        raise CalibrationError(_misshaped(name, f"{tensor.dtype} of shape {tuple(tensor.shape)}"))
    if tensor.dtype.is_complex:
        raise CalibrationError(_misshaped(name, f"{tensor.dtype} of shape {tuple(tensor.shape)}"))
    return tensor.to("cpu", torch.int64)


def _listed(name: str, value: Any) -> list[Any]:
    try:
        return list(value)
    except TypeError as error:
        raise CalibrationError(_misshaped(name, type(value).__name__)) from error


def _misshaped(name: str, found: str) -> str:
    return f"{name} must be whole numbers of shape (n, length), or a list of sequences of them, found {found}."


def _check_range(stream: Tensor, vocab_size: int | None) -> None:
    low, high = (int(bound) for bound in stream.aminmax())
    if low < 0:
        raise CalibrationError(
            f"the calibration tokens hold id {low}, and ids are never negative; give the input_ids of the tokenizer, "
            "not labels (which use -100 for what does not count), and an attention_mask for padding."
        )
    if vocab_size is not None and high >= vocab_size:
        raise TokenizerMismatchError(
            f"the calibration tokens hold id {high}, the model knows 0 to {vocab_size - 1}; use the model's own "
            "tokenizer."
        )
