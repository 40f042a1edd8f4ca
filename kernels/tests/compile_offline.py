"""Compile every kernel for a GPU that may be absent, and print the name and shared memory of each kernel as JSON.

    python kernels/tests/compile_offline.py cuda 90 32
    python kernels/tests/compile_offline.py hip gfx942 64

The launchers run on CPU tensors as usual, but triton only compiles the kernels and does not launch them.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "torch-ext"))

warnings.simplefilter("ignore")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import glowq_kernels  # noqa: E402
from glowq_kernels import launching  # noqa: E402

INPUTS, OUTPUTS, RANK = 4096, 6144, 32


class AbsentGPU:
    """A driver of triton that reports `target` as the current device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def main() -> None:
    backend, architecture, warp = sys.argv[1:]
    target = GPUTarget(backend, int(architecture) if architecture.isdigit() else architecture, int(warp))
    driver.set_active(AbsentGPU(target))
    launching._GPUS["cpu"] = None
    compiled: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        compiled.append({"name": name, "shared": kernel.metadata.shared})

    JITFunction.run = compile_only
    for tokens in (1, 5):
        launch_all(tokens, torch.bfloat16)
    print(json.dumps(compiled))


def launch_all(tokens: int, dtype: torch.dtype) -> None:
    """Call every function once, and `gptq_linear` both with and without `g_idx`."""
    x = torch.zeros(tokens, INPUTS, dtype=dtype)
    glowq_kernels.right(x, torch.zeros(RANK, INPUTS, dtype=torch.int8), torch.zeros(RANK))
    left, scale = torch.zeros(OUTPUTS, RANK, dtype=torch.int8), torch.zeros(OUTPUTS)
    product = torch.zeros(tokens, RANK, dtype=dtype)
    for size in (16, 12):  # bytes of a block of 4 and of 3 bits
        codes, multipliers = torch.zeros(RANK, INPUTS // 32, size, dtype=torch.uint8), torch.zeros(RANK, INPUTS // 32)
        glowq_kernels.right(x, codes, torch.zeros(RANK), multipliers.to(torch.int8))
        codes, multipliers = torch.zeros(OUTPUTS // 32, RANK, size, dtype=torch.uint8), torch.zeros(OUTPUTS // 32, RANK)
        glowq_kernels.left_add_(torch.zeros(tokens, OUTPUTS), product, codes, scale, multipliers.to(torch.int8))
    glowq_kernels.left_add_(torch.zeros(tokens, OUTPUTS, dtype=dtype), product, left.to(dtype))
    extra = {"bias": scale, "product": product, "left": left, "left_scale": scale}
    for order in (None, torch.zeros(INPUTS, dtype=torch.int32)):
        glowq_kernels.gptq_linear(
            x,
            torch.zeros(INPUTS // 8, OUTPUTS, dtype=torch.int32),
            torch.zeros(INPUTS // 128, OUTPUTS // 8, dtype=torch.int32),
            torch.zeros(INPUTS // 128, OUTPUTS, dtype=torch.float16),
            group_size=128,
            g_idx=order,
            **extra,
        )
    glowq_kernels.nf4_linear(
        x,
        torch.zeros(INPUTS * OUTPUTS // 2, dtype=torch.uint8),
        torch.zeros(INPUTS * OUTPUTS // 64),
        torch.zeros(16),
        blocksize=64,
        out_features=OUTPUTS,
        **extra,
    )


if __name__ == "__main__":
    main()
