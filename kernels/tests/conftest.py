"""Fixtures that the tests of the kernels share. Without a GPU the kernels run in triton's interpreter, on the CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

sys.path[:0] = [str(Path(__file__).parents[1] / "torch-ext"), str(Path(__file__).parent)]

from oracles import surrounded  # noqa: E402

from glowq_kernels import unavailable  # noqa: E402


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def library() -> None:
    """kernels/ is no package: its name is that of Hugging Face's library, which pytest's names for these files hide."""
    if not hasattr(sys.modules.get("kernels"), "get_local_kernel"):
        sys.modules.pop("kernels", None)


@pytest.fixture(scope="session")
def device() -> torch.device:
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    return torch.device("cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """Every output starts as NaN, between two stretches of NaN, listed, that must last until the test ends."""
    borders: list[torch.Tensor] = []
    empty: Callable[..., torch.Tensor] = torch.empty

    def poisoned_empty(*size: Any, **options: Any) -> torch.Tensor:
        result = empty(*size, **options)
        if not result.is_floating_point() or not result.numel():
            return result
        result, *edges = surrounded(result.fill_(torch.nan))
        borders.extend(edges)
        return result

    monkeypatch.setattr(torch, "empty", poisoned_empty)
    yield borders
    assert all(edge.isnan().all() for edge in borders)
