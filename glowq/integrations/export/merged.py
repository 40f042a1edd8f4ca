"""Export as a dense model, W' = Q + A B: transformers loads it without glowq and without the quantization library."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import ConfigError, ExportError, ModelNotFoundError
from ...models.forward import example_inputs
from ...models.load_errors import loading
from ...models.loading import load_config, model_class
from ...models.preprocessors import load_tokenizer
from ...quantizers.experts import WHOLE, ExpertLinear, open_experts
from ...quantizers.model import quantized_modules, read_weight
from ..transformers.merge import cast, running_factors
from .common import difference, first_output, load_corrected, stored_correction

__all__ = ["USE", "WHAT", "write"]

WHAT = "one dense model"
USE = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this/repository", dtype="auto")
```"""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_TOLERANCE = 0.1  # relative difference of outputs; many kernels compute in bfloat16 or float16 for any model dtype


def write(source: str, folder: Path, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """Write the dense model, its generation config and its tokenizer.

    The correction is merged module by module, so that merging needs no more memory than the dense model. For the
    check, the corrected model is loaded a second time beside the dense one.

    Args:
        source: folder or Hub name of a corrected model, in either saved form.
        folder: an empty folder to write to.
        dtype: dtype of every weight: "bfloat16", "float16" or "float32".

    Returns:
        "dtype", "weight_bytes", and "check", which holds "weight_error" (the largest error of a weight, divided by the
        error that rounding to `dtype` allows), the differences between the outputs of the dense and the corrected
        model (see `difference`), and "tolerance".

    Raises:
        ConfigError: unknown `dtype`.
        ExportError: the model carries no correction, a dense model has no linear layer under the name of a quantized
            module, or the dense model differs from the corrected model by more than rounding.
        NonFiniteError: a weight is too large for `dtype`.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}, found {dtype!r}.")
    config = stored_correction(source)
    model = load_corrected(source)
    kind = model_class(load_config(source))
    inputs = example_inputs(model)
    expected = first_output(model, inputs)
    model.dequantize(_DTYPES[dtype])
    for name, parameter in model.named_parameters():
        parameter.data = cast(name, parameter.data, _DTYPES[dtype])
    model.save_pretrained(folder)
    del model
    with suppress(ModelNotFoundError):  # not every model reads text
        load_tokenizer(source, (config.base_model or {}).get("name")).save_pretrained(folder)
    return {"dtype": dtype, **_check(source, folder, kind, _DTYPES[dtype], inputs, expected)}


def _check(
    source: str, folder: Path, kind: Any, dtype: torch.dtype, inputs: dict[str, Any], expected: Tensor
) -> dict[str, Any]:
    """Load the dense model with transformers alone, and compare its weights and outputs with the corrected model's.

    Raises:
        ExportError: a tensor is missing, unexpected or of another shape, or weights or outputs differ by more than
            rounding.
    """
    corrected = load_corrected(source)
    with loading(str(folder)):
        merged, info = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, use_safetensors=True)
    merged = merged.to(corrected.device).eval()
    odd = sorted({*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if odd:
        raise ExportError(f"the dense model cannot be loaded as it was written: {odd[0]!r} is missing or unexpected.")
    worst = max(_weight_errors(corrected, merged, dtype).values(), default=0.0)
    figures = difference(first_output(merged, inputs), expected)
    if not (worst <= 1 and figures["relative_difference"] <= _TOLERANCE):
        raise ExportError(
            f"the dense model differs from the corrected one: the largest error of a weight is {worst:.3g} times what "
            f"rounding to {str(dtype).removeprefix('torch.')} allows, and outputs differ by "
            f"{figures['relative_difference']:.3g} of their size, where other kernels explain at most {_TOLERANCE}. "
            "Please report it, with the name of the model."
        )
    size = sum(parameter.nbytes for parameter in merged.parameters())
    return {"weight_bytes": size, "check": {"weight_error": worst, **figures, "tolerance": _TOLERANCE}}


@torch.no_grad()
def _weight_errors(corrected: nn.Module, merged: nn.Module, dtype: torch.dtype) -> dict[str, float]:
    """Module or parameter name -> its largest error, divided by the error that rounding allows.

    The expected weight is computed in float64. Merging rounds Q, A B and their sum to float32, then the sum to `dtype`.
    """
    factors, errors = running_factors(corrected), {}
    single, half = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps / 2
    quantized = quantized_modules(corrected)
    layers = {name: corrected.get_submodule(name) for name in quantized}
    compared = {id(layer.stack) for layer in layers.values() if isinstance(layer, ExpertLinear)}
    if compared:
        open_experts(merged, lambda stack: WHOLE)
    for name, backend in quantized.items():
        weight = read_weight(backend, name, layers[name]).double()
        slack = weight.abs() * 2
        if name in factors:
            left, right = (factor.to(weight.device, torch.float64) for factor in factors[name])
            weight = weight + left @ right
            slack += (right.shape[0] + 2) * (left.abs() @ right.abs())
        module: Any = merged.get_submodule(name)
        found = (module.weight.T if isinstance(module, Conv1D) else module.weight).double()
        # Below the smallest normal number, the bound on the rounding error is absolute and not relative.
        allowed = half * weight.abs() + single * slack + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        errors[name] = float(((found - weight).abs() / allowed).max())
        bias: Any = layers[name].bias
        if bias is not None and not torch.equal(module.bias, bias.to(dtype)):
            errors[f"{name}.bias"] = float("inf")
    kept = {
        name: parameter
        for name, parameter in corrected.named_parameters()
        if _owner(name) not in quantized and id(parameter) not in compared
    }
    written = dict(merged.named_parameters())
    for name, parameter in kept.items():
        if name in written and not torch.equal(written[name].to(dtype), parameter.to(dtype)):
            errors[name] = float("inf")
    return errors


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
