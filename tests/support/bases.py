"""The test matrix: one row per base quantizer, with the function of its library that dequantizes a weight."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glowq.models.fast_products import fast_products
from support import writers
from support.store import once, written

MODEL = Path(__file__).parents[2] / "examples" / "stdlib-llama"
BLOCKS = 2


@dataclass(frozen=True)
class Base:
    """One kind of quantized model: a `--base` name, or a checkpoint that a library wrote.

    Attributes:
        name: a value of `--base`, or a name for the checkpoint's writer and settings.
        package: import name of the library.
        extra: pip extra that installs the library.
        bits: nominal bits per weight.
        kernel_error: largest relative error of the library's kernel (bfloat16 or float16 inside) on float32 inputs.
        dequantize: function of the library that dequantizes the weight of one module.
        write: quantizes the model in the first folder with the library alone and saves it into the second folder, as
            users of the library do; None for a `--base` name, which quantizes while loading.
        read: the library's own loader, (folder, dtype) -> model, if from_pretrained cannot load the model. The folder
            is the output of `write`, or the full-precision model for a `--base` name.
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
        """Load a model quantized by this base, without glowq: `folder`, or two blocks of the bundled model."""
        from transformers import AutoModelForCausalLM

        source = small_model() if folder is None else Path(folder)
        if self.is_preset and self.package in ("gptqmodel", "hqq") and not options:
            return copy.deepcopy(_quantized(self, source, dtype))
        if self.read is not None:
            return self.read(source if self.is_preset else self.checkpoint(source), dtype)
        if self.is_preset:
            options["quantization_config"] = self.config(source)
            return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
        return AutoModelForCausalLM.from_pretrained(self.checkpoint(source), dtype=dtype, **options)

    def config(self, source: Path) -> Any:
        """Return the transformers quantization config of a preset, with calibration text if the quantizer needs it."""
        from transformers import AutoTokenizer

        from glowq.quantizers.registry import base_config, with_calibration

        tokenizer = AutoTokenizer.from_pretrained(source)
        ids = tokenizer("".join(writers.TEXTS), return_tensors="pt").input_ids
        return with_calibration(base_config(self.name), ids[0, : ids.shape[1] // 128 * 128].reshape(-1, 128))

    def checkpoint(self, source: Path) -> Path:
        """Return the folder with the quantized `source` that `write` saved. Tests do not change it."""
        write = self.write
        assert write is not None
        return written(write.func, source, **write.keywords) if isinstance(write, partial) else written(write, source)


@cache
@fast_products(half=True)
def _quantized(base: Base, source: Path, dtype: torch.dtype) -> Any:
    """Load a model that takes seconds to quantize, once per process. The caller copies it and never runs it."""
    return base.load(dtype, source, device_map="cpu")


@cache
def small_model() -> Path:
    """Return the folder of a model made of the first two blocks of the bundled model, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def fill(folder: Path) -> None:
        AutoModelForCausalLM.from_pretrained(MODEL, num_hidden_layers=BLOCKS, dtype="auto").save_pretrained(folder)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)

    return once("small", fill)


def _four_bit(module: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def _eight_bit(module: Any) -> Tensor:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(module.weight, module.state)


def _dequantize(module: Any) -> Tensor:
    return module.weight.dequantize()


def _hqq(module: Any) -> Tensor:
    return module.dequantize()


def _gptq(module: Any) -> Tensor:
    return module.dequantize_weight().T


def _awq(module: Any) -> Tensor:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    packed = (module.qweight, module.qzeros, module.scales.float())
    return dequantize_gemm(*packed, bits=module.bits, group_size=module.group_size).T


def _compressed_tensors(module: Any) -> Tensor:
    """Dequantize a module. When the model first runs, the library replaces the packed tensors by `.weight`."""
    from compressed_tensors.compressors import decompress_module

    if not hasattr(module, "weight"):
        module = copy.deepcopy(module)
        decompress_module(module)
    return module.weight.data


_ACT_ORDER = partial(writers.gptqmodel, bits=4, group_size=32, desc_act=True)
_WHOLE_ROWS = partial(writers.gptqmodel, bits=8, group_size=-1, desc_act=False, act_group_aware=False, sym=False)
_THREE_BITS = partial(writers.optimum, bits=3, group_size=64, desc_act=True, sym=False)
_GROUPS = partial(writers.compressed_tensors, num_bits=4, strategy="group", group_size=128)
_ASYMMETRIC = partial(writers.compressed_tensors, num_bits=4, strategy="group", group_size=64, symmetric=False)
_CHANNELS = partial(writers.compressed_tensors, num_bits=8, strategy="channel")
_QUANTO = {"int2": 2, "int4": 4, "int8": 8, "float8": 8}
_HQQ = {bits: partial(writers.quantize_with_hqq, nbits=bits, group_size=64) for bits in (2, 3, 4, 8)}
_HQQ_AXIS_0 = partial(writers.hqq, nbits=4, group_size=64, axis=0)

BASES = [
    Base("nf4", "bitsandbytes", "bitsandbytes", 4, 5e-3, _four_bit),
    Base("nf4-double", "bitsandbytes", "bitsandbytes", 4, 5e-3, _four_bit),
    Base("fp4", "bitsandbytes", "bitsandbytes", 4, 5e-3, _four_bit),
    Base("fp4-double", "bitsandbytes", "bitsandbytes", 4, 5e-3, _four_bit),
    Base("int8", "bitsandbytes", "bitsandbytes", 8, 5e-3, _eight_bit),
    Base("torchao-int8", "torchao", "torchao", 8, 1e-6, _dequantize),
    Base("torchao-int4", "torchao", "torchao", 4, 1e-6, _dequantize),
    Base("torchao-int3", "torchao", "torchao", 3, 1e-6, _dequantize),
    Base("torchao-int2", "torchao", "torchao", 2, 1e-6, _dequantize),
    *(Base(f"gptq-{bits}", "gptqmodel", "gptq", bits, 5e-3, _gptq) for bits in (2, 3, 4, 8)),
    Base("gptqmodel-int4-act-order", "gptqmodel", "gptq", 4, 5e-3, _gptq, write=_ACT_ORDER),
    Base("gptqmodel-int8-rows", "gptqmodel", "gptq", 8, 5e-3, _gptq, write=_WHOLE_ROWS),
    Base("optimum-int3-act-order", "gptqmodel", "gptq", 3, 5e-3, _gptq, write=_THREE_BITS),
    Base("auto-gptq-int4", "gptqmodel", "gptq", 4, 5e-3, _gptq, write=writers.auto_gptq),
    Base("awq-int4", "gptqmodel", "awq", 4, 5e-3, _awq, write=writers.awq),
    *(Base(f"quanto-{kind}", "optimum.quanto", "quanto", bits, 1e-6, _dequantize) for kind, bits in _QUANTO.items()),
    *(Base(f"hqq-{bits}", "hqq", "hqq", bits, 1e-6, _hqq, read=quantize) for bits, quantize in _HQQ.items()),
    Base("hqq-saved-int4-axis-0", "hqq", "hqq", 4, 1e-6, _hqq, write=_HQQ_AXIS_0, read=writers.load_with_hqq),
    Base("w4a16", "compressed_tensors", "compressed-tensors", 4, 1e-6, _compressed_tensors, write=_GROUPS),
    Base("w4a16-asym", "compressed_tensors", "compressed-tensors", 4, 1e-6, _compressed_tensors, write=_ASYMMETRIC),
    Base("w8a16-channels", "compressed_tensors", "compressed-tensors", 8, 1e-6, _compressed_tensors, write=_CHANNELS),
]


def repacks() -> bool:
    """Whether bitsandbytes has a kernel for this CPU that rewrites 4-bit weights."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def rows(*names: str) -> list[Any]:
    """Return the named rows (all rows without names) as pytest parameters. Rows of missing libraries are skipped."""
    chosen = [base for base in BASES if not names or base.name in names]
    return [
        pytest.param(base, id=base.name, marks=pytest.mark.skipif(not base.installed, reason=f"needs {base.package}"))
        for base in chosen
    ]
