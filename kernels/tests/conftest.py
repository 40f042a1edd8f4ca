"""Fixtures for the tests of the kernels. Without a GPU the kernels run in triton's interpreter, on the CPU."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

sys.path[:0] = [str(Path(__file__).parents[1] / "torch-ext"), str(Path(__file__).parent)]

from fused_layers import BASES, WIDTHS, corrected  # noqa: E402
from oracles import surrounded  # noqa: E402

import glowq_kernels  # noqa: E402
from glowq_kernels import unavailable  # noqa: E402


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def library() -> None:
    """Make `import kernels` find Hugging Face's library.

    Pytest registers the folder kernels/ as a module of the same name, which would hide the library.
    """
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
    """Fill every new output with NaN, and place it between two regions of NaN that must be unchanged after the test.

    Returns the list of these regions.
    """
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


@pytest.fixture
def fused(library: None) -> Any:
    """The module `glowq.runtime.fused`; glowq is not needed for the other tests of the kernels."""
    return pytest.importorskip("glowq.runtime.fused")


@pytest.fixture
def calls(fused: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Numbers of calls of the kernels and of the right product."""
    counts: Counter[str] = Counter()

    def count(place: Any, name: str) -> None:
        function = getattr(place, name)

        def called(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(place, name, called)

    for name in ("nf4_linear", "gptq_linear", "left_add_"):
        count(glowq_kernels, name)
    count(pytest.importorskip("glowq.runtime.operators"), "right")
    return counts


@pytest.fixture
def make(fused: Any, calls: Counter[str], device: torch.device) -> Callable[..., Any]:
    """A function that builds corrected and fused layers of the base with the given name."""

    def build(base: str, **options: Any) -> Any:
        model = corrected(BASES[base], device, **options)
        assert fused.fuse(model) == len(WIDTHS)
        calls.clear()
        return model

    return build
