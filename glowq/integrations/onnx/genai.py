"""Write genai_config.json, which onnxruntime-genai needs to run a decoder's graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .graph import MODEL_FILE, Interface

__all__ = ["write_genai_config"]

GENAI_CONFIG = "genai_config.json"
_SEARCH = ("do_sample", "num_beams", "repetition_penalty", "temperature", "top_k", "top_p")


def write_genai_config(folder: Path, model: Any, interface: Interface) -> bool:
    """Write genai_config.json for a decoder, and return whether it was written.

    It is not written for an encoder, nor for a decoder whose keys and values have different shapes in different layers:
    onnxruntime-genai supports one shape only.
    """
    if interface.cache is None or len({shape for pair in interface.cache.shapes for shape in pair}) > 1:
        return False
    (heads, size), _ = interface.cache.shapes[0]
    text, generation = model.config.get_text_config(), model.generation_config
    ids = {name: _first(name, generation, text) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    stop = ids["eos_token_id"]
    if ids["pad_token_id"] is None and stop is not None:
        ids["pad_token_id"] = stop[0] if isinstance(stop, list) else stop
    length = getattr(text, "max_position_embeddings", None) or 4096
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL_FILE,
        "head_size": size,
        "hidden_size": text.hidden_size,
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": len(interface.cache.shapes),
        "num_key_value_heads": heads,
        "inputs": {
            **{name: name for name in interface.inputs},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    found = {
        "model": {
            "type": "decoder",  # for every architecture, because the graph itself describes the architecture
            "context_length": length,
            "vocab_size": text.vocab_size,
            **{name: value for name, value in ids.items() if value is not None},
            "decoder": decoder,
        },
        "search": {
            "max_length": length,
            "past_present_share_buffer": False,
            **{name: value for name in _SEARCH if (value := getattr(generation, name, None)) is not None},
        },
    }
    (folder / GENAI_CONFIG).write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    return True


def _first(name: str, *configs: Any) -> Any:
    return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)
