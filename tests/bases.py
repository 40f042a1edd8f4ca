"""The test matrix: one row per base quantizer, with the library's own way to read its weight back."""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

MODEL = Path(__file__).parents[1] / "examples" / "stdlib-llama"
BLOCKS = 2
TEXTS = [
    "def area(width, height):\n    return width * height\n" * 40,
    "import os\n\nclass Reader:\n    pass\n" * 60,
] * 4


@dataclass(frozen=True)
class Base:
    """One kind of quantized model: a `--base` name, or a checkpoint that a library wrote.

    Attributes:
        name: as `--base` takes it, or of the checkpoint's writer and settings.
        package: import name of the library.
        extra: pip extra that installs it.
        bits: nominal bits a weight.
        kernel_error: largest relative error of the library's kernel (bfloat16 or float16 inside) on float32 inputs.
        dequantize: the library's own read-back of one module.
        write: quantizes the model in the first folder with the library alone and saves it into the second, as its
            users do; None for a `--base` name, which quantizes while loading.
        read: loads what `write` saved, where from_pretrained cannot: (folder, dtype) -> model.
    """

    name: str
    package: str
    extra: str
    bits: int
    kernel_error: float
    dequantize: Callable[[nn.Module], Tensor]
    write: Callable[[Path, Path], None] | None = None
    read: Callable[[Path, torch.dtype], nn.Module] | None = None

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    @property
    def is_preset(self) -> bool:
        return self.write is None

    def load(self, dtype: torch.dtype = torch.float32, folder: str | Path | None = None, **options: Any) -> Any:
        """A model quantized by this base, untouched by glowq: `folder`, or two blocks of the bundled model."""
        from transformers import AutoModelForCausalLM

        source = small_model() if folder is None else Path(folder)
        if self.write is None:
            options["quantization_config"] = self.config(source)
            return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
        if self.read is not None:
            return self.read(self.checkpoint(source), dtype)
        return AutoModelForCausalLM.from_pretrained(self.checkpoint(source), dtype=dtype, **options)

    def config(self, source: Path) -> Any:
        """The transformers quantization config of a preset, with text to quantize with where it needs any."""
        from transformers import AutoTokenizer

        from glowq.backends import backend_of, base_config

        config = base_config(self.name)
        backend = backend_of(str(getattr(config.quant_method, "value", config.quant_method)))
        if backend is not None and backend.calibrated(config):
            config = backend.with_calibration(config, TEXTS, AutoTokenizer.from_pretrained(source))
        return config

    def checkpoint(self, source: Path) -> Path:
        """The folder that `write` saved `source` to: written once a process."""
        assert self.write is not None
        return _written(self, source)


@cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="glowq-bases-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _written(base: Base, source: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"{base.name}-", dir=_scratch()))
    assert base.write is not None
    base.write(source, folder)
    return folder


@cache
def small_model() -> Path:
    """The first two blocks of the bundled model, trained weights and tokenizer, as a model of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _scratch() / "small"
    AutoModelForCausalLM.from_pretrained(MODEL, num_hidden_layers=BLOCKS, dtype="auto").save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


def _four_bit(module: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def _eight_bit(module: Any) -> Tensor:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(module.weight, module.state)


def _torchao(module: Any) -> Tensor:
    return module.weight.dequantize()


BASES = [
    Base("nf4", "bitsandbytes", "bitsandbytes", 4, 5e-3, _four_bit),
    Base("nf4-double", "bitsandbytes", "bitsandbytes", 4, 5e-3, _four_bit),
    Base("fp4", "bitsandbytes", "bitsandbytes", 4, 5e-3, _four_bit),
    Base("fp4-double", "bitsandbytes", "bitsandbytes", 4, 5e-3, _four_bit),
    Base("int8", "bitsandbytes", "bitsandbytes", 8, 5e-3, _eight_bit),
    Base("torchao-int8", "torchao", "torchao", 8, 1e-6, _torchao),
    Base("torchao-int4", "torchao", "torchao", 4, 1e-6, _torchao),
    Base("torchao-int3", "torchao", "torchao", 3, 1e-6, _torchao),
    Base("torchao-int2", "torchao", "torchao", 2, 1e-6, _torchao),
]


def rows(*names: str) -> list[Any]:
    """The named rows (all of them without names) as pytest parameters; one whose library is absent is skipped."""
    chosen = [base for base in BASES if not names or base.name in names]
    return [
        pytest.param(base, id=base.name, marks=pytest.mark.skipif(not base.installed, reason=f"needs {base.package}"))
        for base in chosen
    ]
