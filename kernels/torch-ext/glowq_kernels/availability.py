"""Whether the kernels can run on this machine. Importing this module needs only torch."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch

__all__ = ["interpreted", "unavailable"]

_OLDEST_TRITON = (3, 4)
_OLDEST_CAPABILITY = (8, 0)  # the oldest NVIDIA compute capability that triton supports


def unavailable() -> str | None:
    """Return why the kernels cannot run on this machine and what to do, in one sentence; None if they can run.

    Imports triton. With TRITON_INTERPRET=1 the kernels run slowly on the CPU, for tests. Triton reads that variable
    when the kernels are imported, at the first call of a kernel.
    """
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); install triton 3.4 or newer."
    version = str(triton.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TRITON:
        return f"triton {version} is too old; install triton 3.4 or newer."
    if triton.knobs.runtime.interpret:
        return None
    return _device_missing() or _compiler_missing()


def interpreted() -> bool:
    """Whether the kernels run in triton's interpreter, which also takes CPU tensors.

    Imports triton only if TRITON_INTERPRET is set.
    """
    if "TRITON_INTERPRET" not in os.environ or unavailable() is not None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _device_missing() -> str | None:
    if torch.cuda.is_available():
        if torch.version.hip is None and torch.cuda.get_device_capability() < _OLDEST_CAPABILITY:
            found = ".".join(str(part) for part in torch.cuda.get_device_capability())
            return f"triton needs an NVIDIA GPU of compute capability 8.0 or newer, found {found}; use another GPU."
        return None
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return None
    return "torch finds no CUDA, ROCm or XPU device; TRITON_INTERPRET=1 runs the kernels on the CPU, for tests only."


def _compiler_missing() -> str | None:
    """Return what triton lacks to compile the C code of its launcher, which it does when it first uses a GPU."""
    if os.name != "posix":
        return None  # triton for Windows includes a compiler
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler for its launcher; install gcc or clang, or name one in the variable CC."
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").exists():
        return f"triton needs Python's C headers for its launcher, found no Python.h in {headers}; install them."
    return None
