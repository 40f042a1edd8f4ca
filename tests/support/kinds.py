"""Tiny random models of many kinds: their configs, and how they are saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

import glowq
from support.tiny import CALIBRATION, CHEAP, EXAMPLE, TEXTS, VOCABULARY, seeded

SIZES = {**VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
IMAGES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES |= {"image_size": 32, "patch_size": 8}

SOUND = {**SIZES, "conv_dim": [64, 64], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
SPEECH = {"vocab_size": 4096, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128}
SPEECH |= {"decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0}
SPEECH |= {"max_source_positions": 40, "num_mel_bins": 20}
SPEECH |= {"bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}


def llava() -> Any:
    vision = AutoConfig.for_model("clip_vision_model", **IMAGES)
    text = AutoConfig.for_model("llama", **SIZES)
    return AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_index=300)


def deberta() -> Any:
    return AutoConfig.for_model("deberta-v2", **SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"])


def save(config: Any, kind: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random model, with the tokenizer of the bundled model."""
    with seeded(0):
        kind.from_config(config).to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EXAMPLE).save_pretrained(folder)
    return folder


def load(kind: Any, folder: Path, base: str | None = None, **options: Any) -> Any:
    if base is not None:
        request = {"calibration": TEXTS, "rank": 4, **CALIBRATION, **CHEAP, **options}
        return kind.from_pretrained(folder, quantization_config=glowq.GlowQConfig(base=base, **request))
    return kind.from_pretrained(folder)
