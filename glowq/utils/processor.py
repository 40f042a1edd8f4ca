"""How fast this processor multiplies matrices of half precision, measured once a process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["float32_is_faster", "forced", "has_avx512", "slowdown"]

# float32 is taken if it is this many times faster: far from all that was measured, so that the choice, on which every
# figure depends, is always the same. Measured: 0.5 (AVX512-BF16), 1.1 to 1.5 (AMX, bfloat16), 1.8 to 2.1 (AMX,
# float16), 5 to 40 (AVX2).
_SLOW = 3.0
_PROBE = (32, 256, 256)  # rows, inputs and outputs of the products that are timed
_REPEATS = 15

_state = threading.local()


def float32_is_faster(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies float32 matrices three times as fast as those of a half precision `dtype`.

    It is measured once a process, in some milliseconds. For other dtypes it is False.
    """
    import torch

    if dtype not in (torch.bfloat16, torch.float16):
        return False
    choice: bool | None = getattr(_state, "forced", None)
    return slowdown(dtype) > _SLOW if choice is None else choice


def has_avx512() -> bool:
    """Whether libraries use AVX512 kernels on this processor."""
    import torch

    return "AVX512" in torch.backends.cpu.get_cpu_capability()


@contextmanager
def forced(float32: bool) -> Iterator[None]:
    """Inside this context, `float32_is_faster` returns `float32` for half precision, and nothing is measured."""
    before = getattr(_state, "forced", None)
    _state.forced = float32
    try:
        yield
    finally:
        _state.forced = before


@cache
def slowdown(dtype: torch.dtype) -> float:
    """How many times longer this processor takes for products of `dtype` than of float32."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # where other programs run, threads wait for each other longer than these products take
    try:
        return _seconds(dtype) / _seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def _seconds(dtype: torch.dtype) -> float:
    """The shortest time of a forward product and of the product that its backward pass needs for the input."""
    import torch

    rows, inputs, outputs = _PROBE
    x, weight = torch.ones(rows, inputs).to(dtype), torch.ones(outputs, inputs).to(dtype)
    times = []
    with torch.no_grad():
        for _ in range(_REPEATS):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight) @ weight
            times.append(time.perf_counter() - start)
    return min(times)
