"""A tiny model and its correction in every saved form, with the factors that each form applies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import glowq
from glowq.artifact.factor_tensors import factor_tensors
from glowq.factors.factors import GroupFactors
from support.tiny import CHEAP, load, quantized, seeded

FORMS = {"correction": "glowq.safetensors", "int8": "glowq.safetensors", "full": "model.safetensors"}
IDS = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Saved:
    """A saved form.

    Attributes:
        folder: its folder; tests change copies of its files only.
        weights: name of the file that holds the factors.
        config, content: config.json and the file of the factors, as bytes.
        factors: what `applied` returns for the factors of the file.
        logits: what `answers` returns for the model that `from_pretrained` loads.
    """

    folder: Path
    weights: str
    config: bytes
    content: bytes
    factors: dict[str, Any]
    logits: Tensor

    def copy(self, folder: Path, config: bytes | None = None, content: bytes | None = None) -> Path:
        """Write config.json and the file of the factors into `folder`, as they are or as given."""
        (folder / "config.json").write_bytes(self.config if config is None else config)
        (folder / self.weights).write_bytes(self.content if content is None else content)
        return folder


def applied(factors: list[GroupFactors]) -> dict[str, Any]:
    """Module -> the factors that correct it, as bytes with their dtypes and shapes."""
    found = {}
    for entry in factors:
        stored = factor_tensors([entry])
        right = [_key(stored[name]) for name in sorted(stored) if not name.endswith(".left")]
        found.update({member: (right, _key(stored[f"{member}.left"])) for member in entry.group.members})
    return found


def _key(tensor: Tensor) -> Any:
    return str(tensor.dtype), tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def answers(model: Any) -> Tensor:
    """The logits of a model for fixed tokens, shape (8, 16, 64)."""
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def write_forms(root: Path) -> dict[str, Saved]:
    """Save a random Llama of one layer to base/, and its nf4 correction of rank 2 to a folder for each form."""
    with seeded(0):
        LlamaForCausalLM(LlamaConfig(**_SIZES)).to(torch.bfloat16).save_pretrained(root / "base")
    model = quantized(root / "base", "nf4")
    asked = {"calibration": IDS, "calibration_tokens": 128, "sequence_length": 16, "rank": 2, **CHEAP}
    correction = glowq.correct(model, reference=root / "base", **asked)
    rounded = correction.rounded("int8")
    correction.save_pretrained(root / "correction")
    rounded.save_pretrained(root / "int8")
    model.save_pretrained(root / "full")
    found = {}
    for name, weights in FORMS.items():
        folder = root / name
        factors = applied((rounded if name == "int8" else correction).factors)
        texts = [(folder / file).read_bytes() for file in ("config.json", weights)]
        found[name] = Saved(folder, weights, texts[0], texts[1], factors, answers(load(folder)))
    return found
