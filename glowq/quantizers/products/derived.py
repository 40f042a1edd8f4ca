"""`Derived`: a value computed from a module's tensors, and cached until the tensors change."""

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
    """A cached value that depends on tensors. It is computed again if a tensor is replaced, moved or written to.

    Values of tensors that were created in `torch.inference_mode` are not cached: such tensors have no version counter,
    so a write to them cannot be detected. Copies and pickles start without a cached value.
    """

    _kept: _Kept | None = None

    def of(self, compute: Callable[[], Any], *sources: Tensor, key: Hashable = None) -> Any:
        """Return the cached value, or compute it.

        Args:
            compute: computes the value; if it is called, it is called before `of` returns.
            sources: the tensors that the value is computed from, any shapes and dtypes.
            key: everything else that the value depends on.
        """
        if any(source.is_inference() for source in sources):
            return compute()
        marks = tuple((source.data_ptr(), source._version) for source in sources)
        kept = self._kept
        if (
            kept is not None
            and kept.marks == marks
            and kept.key == key
            # A new tensor can have the address of a deleted one, so the address alone is not enough.
            and all(seen() is source for seen, source in zip(kept.sources, sources, strict=True))
        ):
            return kept.value
        value = compute()
        # During the capture of a CUDA graph the value is only recorded; it is computed when the graph is replayed.
        if not (any(source.is_cuda for source in sources) and torch.cuda.is_current_stream_capturing()):
            self._kept = _Kept(tuple(weakref.ref(source) for source in sources), marks, key, value)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {}
