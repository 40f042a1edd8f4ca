"""Functions that write quantized checkpoints, each with the quantization library's own commands."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glowq.data.text import read_texts
from glowq.models.fast_products import fast_products

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

TEXTS = [text[:1200] for text in read_texts("python-stdlib") if len(text) > 1200][::16]
"""Texts on which the libraries calibrate: beginnings of modules of the standard library, 300 to 500 tokens each."""


@fast_products(half=True)
def gptqmodel(source: Path, target: Path, **settings: Any) -> None:
    """Quantize and save with gptqmodel, which writes zero points in AutoGPTQ's format."""
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(source), QuantizeConfig(**settings, device="cpu", offload_to_disk=False))
    model.quantize(TEXTS, batch_size=1)
    model.save(str(target))


@fast_products(half=True)
def awq(source: Path, target: Path, **settings: Any) -> None:
    """Quantize with gptqmodel's AWQ: 4 bits in groups of 64, scales folded into norms and linear layers, clipping."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT, METHOD
    from gptqmodel.utils.backend import BACKEND

    fixed: dict[str, Any] = {"bits": 4, "group_size": 64, "method": METHOD.AWQ, "format": FORMAT.GEMM}
    model = GPTQModel.load(str(source), QuantizeConfig(**fixed, **settings, device="cpu", offload_to_disk=False))
    model.quantize(TEXTS, batch_size=1, backend=BACKEND.AWQ_TORCH)
    model.save(str(target))


@fast_products(half=True)
def optimum(source: Path, target: Path, **settings: Any) -> None:
    """Quantize with transformers' GPTQConfig, which uses optimum, and save with save_pretrained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

    config = GPTQConfig(**settings, dataset=TEXTS, tokenizer=str(source), backend="torch", model_seqlen=512)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def auto_gptq(source: Path, target: Path) -> None:
    """Write a checkpoint as AutoGPTQ 0.7 did: 4 bits, asymmetric, zero points minus one, no format in the config."""
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
    """Quantize a model in memory with HQQ's own function."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    AutoHQQHFModel.quantize_model(model, BaseQuantizeConfig(**settings), compute_dtype=dtype, device="cpu")
    return model


def hqq(source: Path, target: Path, **settings: Any) -> None:
    """Save with HQQ's own function, which writes a config.json without HQQ's settings and a pickle of all weights."""
    from hqq.models.hf.base import AutoHQQHFModel

    AutoHQQHFModel.save_quantized(quantize_with_hqq(source, torch.bfloat16, **settings), str(target))


def load_with_hqq(folder: Path, dtype: torch.dtype) -> Any:
    """Load a model that HQQ saved, with HQQ's own function."""
    from hqq.models.hf.base import AutoHQQHFModel

    return AutoHQQHFModel.from_quantized(str(folder), compute_dtype=dtype, device="cpu")


def compressed_tensors(source: Path, target: Path, **settings: Any) -> None:
    """Quantize with compressed-tensors' rounding to nearest and its compressor, as llm-compressor calls them.

    Args:
        **settings: settings of `QuantizationArgs`, for example num_bits, strategy, group_size, symmetric; also
            `ignore`, the names of modules that are not quantized, and `input_activations`. The experts of a mixture
            are divided into linear layers, as llm-compressor does.
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

    inputs, ignore = settings.pop("input_activations", None), ["lm_head", *settings.pop("ignore", ())]
    args = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    if any("expert" in name for name, _ in model.named_parameters()):
        import defuser

        defuser.convert_model(model, cleanup_original=True)
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=ignore))
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            weight = module.weight.detach()
            rows = weight.reshape(1, -1) if args.strategy == "tensor" else weight
            groups = rows.unflatten(1, (-1, args.group_size or rows.shape[1]))
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
            module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
            module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(str(target))
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def mxfp4(source: Path, target: Path) -> None:
    """Write a GPT-OSS as its files are: experts in mxfp4, each 32 values of 4 bits with a power of two as scale."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])

    def packed(weight: Tensor) -> dict[str, Tensor]:
        blocks = weight.transpose(1, 2).float().unflatten(-1, (-1, 32))
        exponents = (blocks.abs().amax(-1) / 6).clamp_min(2.0**-20).log2().ceil()
        codes = (blocks / exponents.exp2()[..., None])[..., None].sub(values).abs().argmin(-1).to(torch.uint8)
        return {"_blocks": codes[..., 0::2] | codes[..., 1::2] << 4, "_scales": (exponents + 127).to(torch.uint8)}

    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    _rewrite(source, target, settings, lambda name: name.endswith(("gate_up_proj", "down_proj")), packed)


def fp8(source: Path, target: Path) -> None:
    """Write linear layers in float8, with a scale for each block of 32 x 32, as in files of DeepSeek and Qwen."""

    def scaled(weight: Tensor) -> dict[str, Tensor]:
        blocks = weight.unflatten(0, (-1, 32)).unflatten(2, (-1, 32))
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
        return {"": codes, "_scale_inv": scales}

    settings = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    _rewrite(source, target, settings, lambda name: name.endswith("proj.weight"), scaled)


def _rewrite(
    source: Path,
    target: Path,
    settings: dict[str, Any],
    chosen: Callable[[str], bool],
    rewritten: Callable[[Tensor], dict[str, Tensor]],
) -> None:
    """Copy a model, with other tensors in the place of some: the ends of their names -> values."""
    shutil.copytree(source, target)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        parts = rewritten(tensor) if chosen(name) else {"": tensor}
        tensors |= {f"{name}{end}": value.contiguous() for end, value in parts.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def gguf(source: Path, file: Path, kind: str) -> None:
    """Write a Llama with the gguf library as llama.cpp's converter does; linear layers have type `kind` ("Q4_0")."""
    from gguf import GGMLQuantizationType, GGUFWriter, TensorNameMap, get_tensor_name_map, quants
    from gguf.constants import MODEL_ARCH

    config = json.loads((source / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = GGUFWriter(str(file), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", *(f"token {index}" for index in range(3, config["vocab_size"]))])
    writer.add_token_merges(["a b"])
    names: TensorNameMap = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(source / "model.safetensors").items():
        weight = tensor.float()
        count = heads.get(name.split(".")[-2])
        if count is not None:  # llama.cpp's rotary embedding rotates adjacent pairs, transformers' halves
            weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        target = names.get_name(name, try_suffixes=(".weight",))
        if name.endswith("_proj.weight"):
            quantized = GGMLQuantizationType[kind]
            writer.add_tensor(target, quants.quantize(weight.numpy(), quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(target, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def float8(source: Path, target: Path) -> None:
    """Quantize to fine-grained float8 as DeepSeek does: blocks of 128 x 128, each stored with its inverse scale."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].float().reshape(rows // 128, 128, columns // 128, 128)
        scales = blocks.abs().amax((1, 3)) / 448
        tensors[name] = (blocks / scales[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales.contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "fmt": "e4m3",
    }
    (target / "config.json").write_text(json.dumps(config))
