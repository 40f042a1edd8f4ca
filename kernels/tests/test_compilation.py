"""The kernels compile for GPUs that are not present, at the shapes of a real layer, and fit their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_offline.py")
KERNELS = {
    "triton_gptq._block",
    "triton_gptq._vector",
    "triton_left._left_add",
    "triton_nf4._block",
    "triton_nf4._vector",
    "triton_right._right",
}


# Maximum shared memory of one block: the smallest of all NVIDIA GPUs since compute capability 8.0, and AMD's CDNA 3.
@pytest.mark.parametrize(
    ("target", "memory"),
    [(("cuda", "80", "32"), 99 * 1024), (("hip", "gfx942", "64"), 64 * 1024)],
    ids=["sm80", "gfx942"],
)
def test_kernels_compile(target: tuple[str, ...], memory: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *target], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    compiled = json.loads(result.stdout)
    assert {kernel["name"] for kernel in compiled} == KERNELS
    assert all(kernel["shared"] <= memory for kernel in compiled)
