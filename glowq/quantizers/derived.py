"""What a backend computes of a module's tensors once, and again when they have changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Derived"]


class _Kept(NamedTuple):
    sources: tuple[weakref.ref[Tensor], ...]
    marks: tuple[tuple[int, int], ...]
    key: Hashable
    value: Any


class Derived:
    """One value that depends on some tensors, kept until one of them is another, lies elsewhere or was written to.

    Nothing is kept of tensors that were made in `torch.inference_mode`: they do not count what is written to them.
    Copies and pickles start empty.
    """

    _kept: _Kept | None = None

    def of(self, compute: Callable[[], Any], *sources: Tensor, key: Hashable = None) -> Any:
        """The value, computed if need be.

        Args:
            compute: computes it; called at once or not at all.
            sources: the tensors that it is computed of, any shapes and dtypes.
            key: whatever else it depends on.
        """
        if any(source.is_inference() for source in sources):
            return compute()
        marks = tuple((source.data_ptr(), source._version) for source in sources)
        kept = self._kept
        if (
            kept is not None
            and kept.marks == marks
            and kept.key == key
            # A tensor that is gone may have left its address to another.
            and all(seen() is source for seen, source in zip(kept.sources, sources, strict=True))
        ):
            return kept.value
        value = compute()
        # What a graph records is computed when it is replayed.
        if not (any(source.is_cuda for source in sources) and torch.cuda.is_current_stream_capturing()):
            self._kept = _Kept(tuple(weakref.ref(source) for source in sources), marks, key, value)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {}
