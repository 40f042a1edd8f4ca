"""Checkpoints as the libraries that quantize write them, each by that library's own commands."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

TEXTS = [
    "def area(width, height):\n    return width * height\n" * 40,
    "import os\n\nclass Reader:\n    pass\n" * 60,
] * 4


def gptqmodel(source: Path, target: Path, **settings: Any) -> None:
    """gptqmodel's own quantizer and its own save (which writes AutoGPTQ's zero points)."""
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(source), QuantizeConfig(**settings, device="cpu", offload_to_disk=False))
    model.quantize(TEXTS, batch_size=1)
    model.save(str(target))


def optimum(source: Path, target: Path, **settings: Any) -> None:
    """transformers' GPTQConfig, which quantizes with optimum, and save_pretrained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

    config = GPTQConfig(**settings, dataset=TEXTS, tokenizer=str(source), backend="torch", model_seqlen=512)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def auto_gptq(source: Path, target: Path) -> None:
    """What AutoGPTQ 0.7 wrote: zero points less one, and a config that names no format. 4 bits, asymmetric."""
    optimum(source, target, bits=4, group_size=64, sym=False)
    file = target / "model.safetensors"
    tensors = load_file(file)
    for name, words in tensors.items():
        if name.endswith(".qzeros"):
            shifts = torch.arange(0, 32, 4)
            zeros = (words[..., None].long() >> shifts) & 15
            assert int(zeros.min()) > 0, "AutoGPTQ could not store a zero point of zero"
            packed = ((zeros - 1) << shifts).sum(-1)
            tensors[name] = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "bits": 4,
        "damp_percent": 0.01,
        "desc_act": False,
        "group_size": 64,
        "model_file_base_name": "model",
        "model_name_or_path": None,
        "quant_method": "gptq",
        "sym": False,
        "true_sequential": True,
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))


def quantize_with_hqq(source: Path, dtype: torch.dtype, **settings: Any) -> Any:
    """HQQ's own quantization of a model in memory."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    AutoHQQHFModel.quantize_model(model, BaseQuantizeConfig(**settings), compute_dtype=dtype, device="cpu")
    return model


def hqq(source: Path, target: Path, **settings: Any) -> None:
    """HQQ's own save: a config.json that does not mention HQQ, and a pickle of all weights."""
    from hqq.models.hf.base import AutoHQQHFModel

    AutoHQQHFModel.save_quantized(quantize_with_hqq(source, torch.bfloat16, **settings), str(target))


def load_with_hqq(folder: Path, dtype: torch.dtype) -> Any:
    """HQQ's own load of what it saved."""
    from hqq.models.hf.base import AutoHQQHFModel

    return AutoHQQHFModel.from_quantized(str(folder), compute_dtype=dtype, device="cpu")


def compressed_tensors(source: Path, target: Path, **settings: Any) -> None:
    """compressed-tensors' own rounding to nearest and its own compressor, as llm-compressor calls them.

    Args:
        **settings: of `QuantizationArgs`, e.g. num_bits, strategy, group_size, symmetric.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM, AutoTokenizer

    inputs = settings.pop("input_activations", None)
    args = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            weight = module.weight.detach()
            groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
            module.weight_scale.data.copy_(scale)
            module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(str(target))
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
