"""A random Llama, quantized by a real library, and random factors, for timing: the values do not change the times."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from glowq.factors.factors import GroupFactors
from glowq.factors.group import Group
from glowq.quantizers.model import prepare_model
from glowq.quantizers.registry import base_config
from glowq.runtime.attach import attach

__all__ = ["add_size_arguments", "attach_randomly", "quantized"]

HEAD = 64


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `quantized` reads."""
    parser.add_argument("--base", default="torchao-int4")
    parser.add_argument("--hidden", type=int, default=2048, help=f"width, a multiple of {HEAD}")
    parser.add_argument("--key-value", type=int, help="outputs of k and of v; default: a quarter of the width")
    parser.add_argument("--intermediate", type=int, default=1024, help="width of the MLP; a narrow one adds less noise")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)


def quantized(arguments: argparse.Namespace, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return a random Llama that is quantized while it loads, and is ready to run.

    Args:
        arguments: see `add_size_arguments`.
        folder: folder for the full-precision model.
        dtype: dtype of all tensors that are not quantized.
    """
    torch.manual_seed(arguments.seed)
    narrow = arguments.key_value or arguments.hidden // 4
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=arguments.hidden // HEAD,
        num_key_value_heads=narrow // HEAD,
        head_dim=HEAD,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    options: dict[str, Any] = {"quantization_config": base_config(arguments.base), "dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(folder / "model", **options)
    prepare_model(model)
    return model.eval()


def attach_randomly(model: nn.Module, groups: Sequence[Group], rank: int, dtype: torch.dtype | None = None) -> None:
    """Attach random factors to each group of the model."""
    for group in groups:
        lefts = {member: _noise(width, rank) for member, width in zip(group.members, group.out_features, strict=True)}
        factors = GroupFactors(group, _noise(rank, group.in_features), lefts, torch.zeros(rank), 0.0)
        attach(model, factors, dtype=dtype)


def _noise(*shape: int) -> Tensor:
    return 0.01 * torch.randn(*shape)
