"""A tiny random model of any type that transformers has: its default config with small sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.models.auto import modeling_auto

from glowq.models.forward import example_inputs
from support.tiny import EXAMPLE, seeded

__all__ = ["auto_class", "inputs_of", "save_shrunk", "shrunk_config"]

_WIDTH = {"hidden_size", "d_model", "n_embd", "dim", "embed_dim", "width", "embedding_size", "word_embed_proj_dim"}
_WIDTH |= {"encoder_hidden_dim", "decoder_hidden_dim", "hidden_dim", "projection_dim", "text_embed_dim", "lru_width"}
_INNER = {"intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "inner_dim"}
_INNER |= {"ffn_hidden_size", "shared_expert_intermediate_size", "hidden_dim_ffn", "mlp_dim"}
_LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_layers", "depth"}
_LAYERS |= {"num_decoder_layers", "num_encoder_layers", "num_blocks"}
_HEADS = {"num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"}
_EXPERTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
_SMALL = {
    **dict.fromkeys(_WIDTH, 64),
    **dict.fromkeys(_INNER, 128),
    **dict.fromkeys(_LAYERS, 2),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_EXPERTS, 4),
    "vocab_size": 4096,
    "head_dim": 16,
    "kv_channels": 16,
    "d_kv": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_top_k": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": 20,
    "max_source_positions": 40,
    "max_target_positions": 64,
    "rotary_dim": 8,
    "attention_window": 8,
    "mamba_chunk_size": 8,
    "num_codebook_vectors": 32,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "sep_token_id": 1}
_CLASSES = {
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "AutoModelForSeq2SeqLM",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "AutoModelForSpeechSeq2Seq",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "AutoModelForImageTextToText",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "AutoModelForImageClassification",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "AutoModelForMaskedLM",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "AutoModelForCausalLM",
}


def shrunk_config(kind: str) -> Any:
    """The config of a model type with small sizes."""
    return AutoConfig.for_model(kind, **_sizes(AutoConfig.for_model(kind)))


def _sizes(config: Any) -> dict[str, Any]:
    """Small values for the fields that a config has, also for those of its parts."""
    found: dict[str, Any] = {}
    heads = next((getattr(config, name) for name in sorted(_HEADS) if isinstance(getattr(config, name, None), int)), 0)
    for name, value in _SMALL.items():
        if isinstance(getattr(config, name, None), int) and not isinstance(getattr(type(config), name, None), property):
            found[name] = value
    grouped = getattr(config, "num_key_value_heads", None)
    if isinstance(grouped, int):
        found["num_key_value_heads"] = 4 if grouped == heads else min(grouped, 2)
    found |= {name: value for name, value in _IDS.items() if isinstance(getattr(config, name, None), int)}
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            found[name] = {"model_type": part.model_type, **_sizes(part)}
    return found


def auto_class(kind: str) -> Any:
    """The auto class of transformers that makes the model people use of a type."""
    for mapping, name in _CLASSES.items():
        if kind in getattr(modeling_auto, mapping):
            return getattr(transformers, name)
    return transformers.AutoModel


def save_shrunk(kind: str, folder: Path) -> None:
    """Save a tiny random model of a type, with the bundled tokenizer; its matrices are large enough to matter."""
    with seeded(0), torch.no_grad():
        model = auto_class(kind).from_config(shrunk_config(kind), dtype=torch.float32)
        for weight in (part for part in model.parameters() if part.dim() == 2):
            weight.normal_(std=0.08)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EXAMPLE).save_pretrained(folder)


def inputs_of(model: Any) -> dict[str, Tensor]:
    """Keyword arguments of one forward: token ids, or random values of what the model reads."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "input_ids":
        ids = torch.randint(2, 4000, (2, 12), generator=generator)
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        example = example_inputs(model)[model.main_input_name]
        found = {model.main_input_name: torch.randn(example.shape, generator=generator)}
    if model.config.is_encoder_decoder:
        rows = len(next(iter(found.values())))
        found["decoder_input_ids"] = torch.randint(2, 4000, (rows, 8), generator=generator)
    return found
