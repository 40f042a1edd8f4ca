"""Fixtures that run vLLM in this process, with the models that `make test-vllm` wrote (`writer.py`)."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # run the engine in this process, so that tests can inspect it
    "VLLM_CPU_INT4_W4A8": "0",  # do not round inputs of 4-bit layers to 8 bits, like transformers
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise only one process per memory node is possible
    "VLLM_NO_USAGE_STATS": "1",
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)


@pytest.fixture(scope="session", autouse=True)
def checkpoints() -> Path:
    """Folder of the models."""
    folder = os.environ.get("GLOWQ_VLLM_CHECKPOINTS")
    if folder is None:
        pytest.skip("needs vLLM and the models that `make test-vllm` writes")
    return Path(folder).resolve()


@contextmanager
def open_engine(folder: Path, **options: Any) -> Iterator[Any]:
    """Open a model in vLLM. The exceptions of vLLM reach the caller unchanged."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {"distributed_executor_backend": "uni", "enforce_eager": True, "max_model_len": 128, "seed": 0}
    model = None
    try:
        model = LLM(str(folder), gpu_memory_utilization=0.05, max_num_seqs=4, **{**settings, **options})
        yield model
    finally:
        del model
        gc.collect()
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def engine() -> Callable[..., Any]:
    """A function that opens a model in vLLM: `with engine(folder, **options) as llm`."""
    return open_engine
