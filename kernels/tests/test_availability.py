"""`unavailable` returns one sentence for each requirement that can be missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from glowq_kernels import unavailable

SOURCES = str(Path(__file__).parents[1] / "torch-ext")


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Simulate a machine that meets all requirements: a GPU, a compiler and triton. A test removes one of them."""
    pytest.importorskip("triton")
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    return monkeypatch


def test_nothing_is_missing(ready: pytest.MonkeyPatch) -> None:
    assert unavailable() is None


def test_the_interpreter_needs_no_gpu(ready: pytest.MonkeyPatch) -> None:
    ready.setenv("TRITON_INTERPRET", "1")
    ready.setattr(torch.cuda, "is_available", lambda: False)
    assert unavailable() is None


@pytest.mark.parametrize("version", ["3.3.1", "2.2.0"])
def test_old_triton(ready: pytest.MonkeyPatch, version: str) -> None:
    ready.setattr("triton.__version__", version)
    assert unavailable() == f"triton {version} is too old; install triton 3.4 or newer."


@pytest.mark.parametrize("version", ["3.4.0", "3.10.0+git1234", "4.0.0"])
def test_new_triton(ready: pytest.MonkeyPatch, version: str) -> None:
    ready.setattr("triton.__version__", version)
    assert unavailable() is None


def test_no_device(ready: pytest.MonkeyPatch) -> None:
    ready.setattr(torch.cuda, "is_available", lambda: False)
    ready.setattr(torch.xpu, "is_available", lambda: False)
    assert unavailable().startswith("torch finds no CUDA, ROCm or XPU device; TRITON_INTERPRET=1")


def test_xpu(ready: pytest.MonkeyPatch) -> None:
    ready.setattr(torch.cuda, "is_available", lambda: False)
    ready.setattr(torch.xpu, "is_available", lambda: True)
    assert unavailable() is None


def test_old_gpu(ready: pytest.MonkeyPatch) -> None:
    ready.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 8.0 or newer, found 7.5" in unavailable()
    ready.setattr(torch.version, "hip", "6.4")  # capabilities of AMD GPUs use other numbers
    assert unavailable() is None


def test_no_compiler(ready: pytest.MonkeyPatch) -> None:
    ready.delenv("CC")
    ready.setattr(shutil, "which", lambda name: None)
    assert unavailable().startswith("triton needs a C compiler for its launcher; install gcc or clang")
    ready.setattr(shutil, "which", lambda name: "/usr/bin/clang" if name == "clang" else None)
    assert unavailable() is None


def test_no_headers(ready: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").unlink()
    assert unavailable() == (
        f"triton needs Python's C headers for its launcher, found no Python.h in {tmp_path}; install them."
    )


def run(script: str, **variables: str) -> str:
    """Run a script in a new Python process and return its output."""
    environment = {"PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_triton() -> None:
    """The package can be imported, reports what is missing, and its twins run."""
    printed = run(
        """
import sys
sys.modules["triton"] = None
import torch, glowq_kernels
print(glowq_kernels.unavailable())
try:
    glowq_kernels.right(torch.ones(1, 4), torch.ones(2, 4))
except glowq_kernels.KernelError as error:
    print(error)
print(glowq_kernels.twins.right(torch.ones(1, 4), torch.ones(2, 4)).tolist())
"""
    ).splitlines()
    assert printed[0].startswith("triton cannot be imported (")
    assert printed[0].endswith("); install triton 3.4 or newer.")
    assert printed[1] == f"The kernels cannot run here: {printed[0]}"
    assert printed[2] == "[[4.0, 4.0]]"


def test_on_the_cpu_without_the_interpreter() -> None:
    """Importing the package does not import triton, and the error for a CPU tensor names the device."""
    pytest.importorskip("triton")
    printed = run(
        """
import sys, torch
before = "triton" in sys.modules
import glowq_kernels
print(("triton" in sys.modules) == before)
try:
    glowq_kernels.right(torch.ones(1, 4), torch.ones(2, 4))
except glowq_kernels.KernelError as error:
    print(error)
"""
    ).splitlines()
    assert printed[0] == "True"
    assert printed[1].startswith("the kernels run on a CUDA, ROCm or XPU device, found tensors on cpu; move them")
