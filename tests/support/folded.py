"""Models with known channel scales in their weights, quantized by rounding, for the tests of channel scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    Starcoder2Config,
)

from glowq.factors.group import Group
from glowq.models.reference import Reference
from glowq.models.tracing import trace_groups
from glowq.models.weight_errors import WeightErrors

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
IDS = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(1))


class Plain:
    """A backend that uses the float weight of a linear module as its quantized weight."""

    def scales(self, module: nn.Module) -> list[Tensor]:
        return []

    def weight(self, module: Any) -> Tensor:
        return module.weight


class ScaledActivation(nn.Module):
    """The module with which AWQ replaces an activation in order to divide its output by scales."""

    def __init__(self, act: nn.Module, scales: Tensor) -> None:
        super().__init__()
        self.act = act
        self.scales = nn.Parameter(scales)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) / self.scales.view(1, 1, -1)


def round_to_nearest(weight: Tensor, bits: int, group: int = 32, *, symmetric: bool = False) -> Tensor:
    parts = weight.unflatten(1, (-1, group))
    if symmetric:
        step = parts.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
        return ((parts / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step).flatten(1)
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    return (((parts - low) / step).round() * step + low).flatten(1)


def random_scales(width: int, seed: int) -> Tensor:
    return (torch.randn(width, generator=torch.Generator().manual_seed(seed)) * 0.4).exp()


def llama(**changes: Any) -> Any:
    config = LlamaConfig(**SHAPE, intermediate_size=192, num_key_value_heads=8, initializer_range=0.1)
    return build(config, **changes)


def build(config: Any, **changes: Any) -> Any:
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def fold(block: Any, producer: str, consumers: list[str], seed: int) -> Tensor:
    """Divide a layer by random scales and multiply the next layers by them, as AWQ does.

    Returns:
        One scale for each input channel of the consumers.
    """
    layer = block.get_submodule(producer)
    width = block.get_submodule(consumers[0]).weight.shape[1]
    if isinstance(layer, nn.Linear):
        heads = layer.weight.shape[0] if layer.weight.shape[0] < width else width
        scale = random_scales(heads, seed)
        layer.weight[-heads:] /= scale[:, None]
        if layer.bias is not None:
            layer.bias[-heads:] /= scale
        # Grouped heads of width 16: several query heads read each value head, so its scales are repeated.
        scale = scale.view(-1, 1, 16).expand(-1, width // heads, -1).reshape(-1)
    elif not list(layer.parameters()):
        scale = random_scales(width, seed)
        parent, _, name = producer.rpartition(".")
        setattr(block.get_submodule(parent), name, ScaledActivation(layer, scale))
    else:
        scale = random_scales(width, seed)
        one = 1.0 if "Gemma" in type(layer).__name__ else 0.0
        layer.weight.copy_((layer.weight + one) / scale - one)
        if getattr(layer, "bias", None) is not None:
            layer.bias /= scale
    for name in consumers:
        block.get_submodule(name).weight *= scale
    return scale


ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
LLAMA = [
    ("input_layernorm", ATTENTION),
    ("self_attn.v_proj", ["self_attn.o_proj"]),
    ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
    ("mlp.up_proj", ["mlp.down_proj"]),
]
MODELS: dict[str, tuple[Callable[[], Any], str, list[tuple[str, list[str]]]]] = {
    "llama": (llama, "model.layers.{}", LLAMA),
    "llama-grouped-heads": (lambda: llama(num_key_value_heads=2), "model.layers.{}", LLAMA),
    "gemma-one-plus-weight": (
        lambda: build(
            GemmaConfig(**SHAPE, intermediate_size=192, num_key_value_heads=2, head_dim=16, initializer_range=0.1)
        ),
        "model.layers.{}",
        LLAMA,
    ),
    "opt-biases-and-relu": (
        lambda: build(OPTConfig(**SHAPE, ffn_dim=192, word_embed_proj_dim=128, init_std=0.1)),
        "model.decoder.layers.{}",
        [
            ("self_attn_layer_norm", ATTENTION),
            ("self_attn.v_proj", ["self_attn.out_proj"]),
            ("final_layer_norm", ["fc1"]),
            ("fc1", ["fc2"]),
        ],
    ),
    "starcoder2-scaled-activation": (
        lambda: build(Starcoder2Config(**SHAPE, intermediate_size=192, num_key_value_heads=2, initializer_range=0.1)),
        "model.layers.{}",
        [*LLAMA[:2], ("post_attention_layernorm", ["mlp.c_fc"]), ("mlp.act", ["mlp.c_proj"])],
    ),
    "phi3-fused": (
        lambda: build(Phi3Config(**SHAPE, intermediate_size=192, num_key_value_heads=8, initializer_range=0.1)),
        "model.layers.{}",
        [
            ("input_layernorm", ["self_attn.qkv_proj"]),
            ("self_attn.qkv_proj", ["self_attn.o_proj"]),
            ("post_attention_layernorm", ["mlp.gate_up_proj"]),
            ("mlp.gate_up_proj", ["mlp.down_proj"]),
        ],
    ),
}


def groups_of(model: Any) -> list[Group]:
    return [group for group in trace_groups(model, {"input_ids": IDS}).groups if group.block != "lm_head"]


def unfolding(model: Any, reference: Any) -> WeightErrors:
    names = [name for group in groups_of(model) for name in group.members]
    plain: Any = dict.fromkeys(names, Plain())
    return WeightErrors(model, Reference(reference, type(model)), plain)


@torch.no_grad()
def quantize(model: Any, bits: int, **options: Any) -> Any:
    for group in groups_of(model):
        for name in group.members:
            weight = model.get_submodule(name).weight
            weight.copy_(round_to_nearest(weight, bits, **options))
    return model


def relative(error: Tensor, weight: Tensor) -> float:
    return float(error.norm() / weight.norm())
