"""Small encoders with random weights, whose blocks have weights of their own ("bert") or share them ("albert")."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def random_encoder(kind: str) -> Any:
    """An encoder in evaluation mode; two of one kind are equal."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(**_SIZES)) if kind == "bert" else AlbertModel(AlbertConfig(**_SIZES))
    return model.eval()
