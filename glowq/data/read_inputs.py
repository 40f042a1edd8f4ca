"""Read samples of any modality: mappings of tensors, as a processor returns them, or code that gives such mappings."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import CalibrationError
from .inputs import Inputs

__all__ = ["holds_inputs", "peeked", "read_inputs"]

_TEXT_FIELDS = {"input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "length", "labels"}
_MASKS = ("attention_mask", "decoder_attention_mask")
_NO_LABEL = -100  # by the convention of transformers, a label that counts for nothing
_ROWS = ("input_ids", "attention_mask")  # the first of them tells how many samples a mapping holds


def holds_inputs(source: Any) -> bool:
    """Whether a source is neither text nor token ids alone: samples, or code that gives them.

    Samples are a mapping of tensors with other fields than text has, a list of mappings of tensors, or a DataLoader.
    Code is a function without arguments.
    """
    if isinstance(source, Inputs):
        return True
    if isinstance(source, Mapping):
        return not set(source) <= _TEXT_FIELDS and any(map(_is_array, source.values()))
    if isinstance(source, Sequence) and not isinstance(source, str):
        return bool(source) and isinstance(source[0], Mapping) and any(map(_is_array, source[0].values()))
    return not isinstance(source, str | Tensor | np.ndarray) and (callable(source) or isinstance(source, DataLoader))


def peeked(source: Any) -> Any:
    """The same source, where an iterator is looked into: a list of its texts, or a function that gives its samples."""
    if not isinstance(source, Iterator):
        return source
    first = next(source, None)
    rest = itertools.chain(() if first is None else [first], source)
    return (lambda: rest) if isinstance(first, Mapping) else list(rest)


def read_inputs(source: Any) -> Iterator[dict[str, Tensor]]:
    """Read samples one by one, and take the padding out.

    Args:
        source: see `holds_inputs`. A mapping may hold a batch of samples: the first dimension of its tensors. Code may
            have no end.

    Yields:
        Keyword arguments of one forward for each sample, with a batch dimension of 1, on the CPU.

    Raises:
        CalibrationError: a field is no tensor, or the fields of a mapping do not fit together.
    """
    for number, mapping in enumerate(_mappings(source)):
        yield from _samples(mapping, number)


def _mappings(source: Any) -> Iterator[Mapping[str, Any]]:
    given = source() if callable(source) and not isinstance(source, Mapping) else source
    if isinstance(given, Mapping):
        yield given
        return
    try:
        items = iter(given)
    except TypeError as error:
        raise CalibrationError(
            f"calibration gives {type(given).__name__}: expected mappings of tensors, as a processor returns them."
        ) from error
    for number, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise CalibrationError(
                f"calibration sample {number} is {type(item).__name__}: expected a mapping of tensors, as a processor "
                "returns it."
            )
        yield item


def _samples(mapping: Mapping[str, Any], number: int) -> list[dict[str, Tensor]]:
    """The samples of one mapping, each without its padding."""
    fields = {name: _tensor(name, value, number) for name, value in mapping.items() if value is not None}
    counts = {name: len(value) for name, value in fields.items()}
    first = next((counts[name] for name in _ROWS if name in counts), max(counts.values(), default=0))
    if set(counts.values()) == {first} and first > 1:
        return [_unpadded({name: value[row : row + 1] for name, value in fields.items()}) for row in range(first)]
    if first > 1:
        raise CalibrationError(
            f"calibration sample {number} holds fields of different numbers of rows "
            f"({', '.join(f'{name} {count}' for name, count in sorted(counts.items()))}): give one sample a mapping."
        )
    return [_unpadded(fields)] if fields else []


def _unpadded(fields: dict[str, Tensor]) -> dict[str, Tensor]:
    """One sample without the positions that a mask leaves out, in all fields that have one value for each of them."""
    for name in _MASKS:
        mask = fields.get(name)
        if mask is None or mask.dim() != 2 or bool((mask == 1).all()):
            continue
        keep = mask[0] == 1
        if not bool(keep.any()):
            raise CalibrationError(f"calibration: the {name} of a sample leaves out everything; leave out the sample.")
        for field, value in fields.items():
            has_positions = value.dim() == 2 or field.endswith("inputs_embeds")
            if _is_of_decoder(field) == _is_of_decoder(name) and has_positions and value.shape[1] == len(keep):
                fields = {**fields, field: value[:, keep]}
    labels = fields.get("labels")
    if labels is not None and labels.dim() == 2:
        fields = {**fields, "labels": labels[:, labels[0] != _NO_LABEL]}
    return fields


def _is_of_decoder(field: str) -> bool:
    return field.startswith("decoder_") or field == "labels"


def _tensor(name: str, value: Any, number: int) -> Tensor:
    if isinstance(value, Tensor):
        found = value.detach()
    elif _is_array(value):
        found = torch.as_tensor(np.asarray(value))
    else:
        found = None
    if found is None or found.dim() < 1 or not len(found):
        shown = type(value).__name__ if found is None else f"a tensor of shape {tuple(found.shape)}"
        raise CalibrationError(
            f"calibration sample {number}: {name!r} is {shown}, not a tensor with a batch dimension; let the processor "
            'return tensors (return_tensors="pt").'
        )
    return found.to("cpu")


def _is_array(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return isinstance(value, Tensor) or value.dtype.kind in "biuf"
    return isinstance(value, list) and bool(value) and isinstance(value[0], int | float | list | np.ndarray)
