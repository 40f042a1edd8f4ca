"""Finished cells of a comparison on disk, so that an interrupted comparison goes on where it stopped.

A cell is the factors of one method at one budget, the figures of all models on one batch of text, or of one
alternative. Each is stored as `glowq.pipeline.block_store` stores a block.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...artifact.build import stored_config
from ...evaluation.scores import Keep
from ...factors.units import GainUnit
from ...models.reference import Reference
from ...runtime.attach import factor_dtype
from ..block_store import BlockFolder, Resume, run_key
from .budgets import Entry

__all__ = ["Cells", "cells_of", "lists_of", "tensors_of"]

_Scores = TypeVar("_Scores", bound=Any)  # a dataclass of float64 tensors
_Value = TypeVar("_Value")

_logger = logging.getLogger(__name__)


class Cells:
    """The finished cells of one comparison.

    Args:
        folder: where they are stored; None stores nothing.
        key: differs between comparisons that differ in anything.
    """

    def __init__(self, folder: BlockFolder | None = None, key: str = "") -> None:
        self.folder = folder
        self.key = key

    def resume(self, name: str) -> Resume:
        """Where the finished blocks of one correction of the comparison are stored."""
        return Resume(self.folder, self.key, f"{name}, ")

    def value(self, name: str, make: Callable[[], Any], read: Callable[[Any], _Value]) -> _Value:
        """What was stored when the cell was finished, or what is made and stored now.

        Args:
            name: name of the cell.
            make: function that returns what to store, as JSON has it.
            read: function that turns what was stored into what is returned. If it fails, the cell is made again.
        """
        found = None if self.folder is None else self.folder.read(name, self.key)
        if found is not None:
            with self._tolerating(name):
                return read(found.value)
        value = make()
        if self.folder is not None:
            self.folder.write(name, self.key, value=value)
        return read(value)

    def entry(self, label: str) -> Entry | None:
        """The finished entry of this label, or None."""
        found = None if self.folder is None else self.folder.read(label, self.key)
        if found is not None:
            with self._tolerating(label):
                unit = found.value["gains"]
                entry = replace(Entry(**found.value, factors=tuple(found.factors)), gains=unit and GainUnit(unit))
                return entry if entry.label == label else None
        return None

    @contextmanager
    def _tolerating(self, name: str) -> Iterator[None]:
        """Inside this context, what is not as this version stores it is no error: the cell is made again."""
        try:
            yield
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            _logger.warning(
                "cell %r in %s is damaged (%s): it is made again.", name, self.folder and self.folder.path, error
            )

    def keep(self, entry: Entry) -> None:
        """Store a finished entry."""
        if self.folder is not None:
            value = {field: value for field, value in vars(entry).items() if field != "factors"}
            self.folder.write(entry.label, self.key, entry.factors, value=value)

    def scores(self, kind: type[_Scores], name: str) -> Keep[_Scores]:
        """Where `score_models` or `cloze_scores` keep the figures of every batch.

        Args:
            kind: the dataclass of a model's figures.
            name: what is measured.
        """

        def batch(index: int, make: Callable[[], Mapping[str, _Scores]]) -> Mapping[str, _Scores]:
            def lists() -> dict[str, Any]:
                return {label: lists_of(one) for label, one in make().items()}

            def tensors(found: Any) -> dict[str, _Scores]:
                return {label: tensors_of(kind, one) for label, one in found.items()}

            return self.value(f"{name}, batch {index}", lists, tensors)

        return batch


def lists_of(score: Any) -> dict[str, Any]:
    """The figures of a model as JSON holds them, without loss; `score` is a dataclass of float64 tensors."""
    return {field.name: getattr(score, field.name).tolist() for field in fields(score)}


def tensors_of(kind: type[_Scores], lists: Mapping[str, Any]) -> _Scores:
    """The dataclass `kind` that `lists_of` was given."""
    return kind(**{name: torch.tensor(value, dtype=torch.float64) for name, value in lists.items()})


def cells_of(
    folder: BlockFolder | None,
    model: nn.Module,
    reference: str,
    texts: Sequence[Tensor],
    seed: int,
    settings: Sequence[Any],
) -> Cells:
    """The finished cells of a comparison.

    Args:
        folder: where they are stored; None stores nothing.
        model: the quantized model.
        reference: folder or Hub name of the full-precision model.
        texts: token ids to calibrate on, and token ids to measure on, int64.
        seed: seed of everything.
        settings: what else the figures depend on, as JSON has it.
    """
    if folder is None:
        return Cells()
    with Reference(reference, type(model), getattr(model, "device", None), fresh=model) as source:
        identity = source.identity()
    config = stored_config(model, reference, 0, "glowq", texts[0], seed)
    keys = [run_key(config, identity, {}, factor_dtype(model), text) for text in texts]
    return Cells(folder, hashlib.sha256(json.dumps([keys, list(settings)]).encode()).hexdigest())
