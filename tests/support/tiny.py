"""A tiny Llama with the bundled tokenizer, and functions that quantize, correct and load it."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import glowq

EXAMPLE = Path(__file__).parents[2] / "examples" / "stdlib-llama"
BASES = ["nf4", "nf4-double", "fp4", "fp4-double", "int8"]
BASES += ["torchao-int8", "torchao-int4", "torchao-int3", "torchao-int2"]
TEXTS = [
    "def area(width, height):\n    return width * height\n" * 40,
    "import os\n\nclass Reader:\n    pass\n" * 60,
] * 4
CALIBRATION: dict[str, Any] = {"calibration_tokens": 1024, "sequence_length": 128}
# A method without gradients, for corrections that only have to be saved, loaded or refused, not to be of use.
CHEAP: dict[str, Any] = {"method": "svd", "force": True}
VOCABULARY: dict[str, Any] = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SHAPE: dict[str, Any] = {
    **VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
IDS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside this context and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tiny_llama(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    """Save a random full-precision Llama of two layers with the bundled tokenizer, and return the folder."""
    with seeded(seed):
        LlamaForCausalLM(LlamaConfig(**{**SHAPE, **config})).to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EXAMPLE).save_pretrained(folder)
    return folder


def library_texts(folder: Path) -> None:
    """Write train.txt and test.txt from different modules of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for target, names in (("train", ("csv.py", "shutil.py")), ("test", ("textwrap.py", "bisect.py", "argparse.py"))):
        (folder / f"{target}.txt").write_text("".join((library / name).read_text("utf-8") for name in names))


def biased_llama(folder: Path, **config: Any) -> Path:
    """Save `tiny_llama` in float32, with a random bias in every linear layer of its blocks."""
    model = load(tiny_llama(folder, attention_bias=True, mlp_bias=True, dtype=torch.float32, **config))
    with torch.no_grad(), seeded(0):
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


def quantized(folder: Path | str, base: str, **kwargs: Any) -> Any:
    """Load a model that its library quantizes, without glowq's quantizer."""
    config = glowq.GlowQConfig(base=base).base
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **kwargs)


def correct(model: nn.Module, folder: Path, **options: Any) -> glowq.Correction:
    """Correct a quantized model in place, with the tokenizer and the full-precision weights of a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = {"reference": folder, "calibration": TEXTS, "tokenizer": tokenizer, "rank": 4, **CALIBRATION}
    return glowq.correct(model, **{**settings, **options})


def corrected(folder: Path, base: str, **options: Any) -> tuple[Any, glowq.Correction]:
    """Quantize a model and correct it in place. Return the model and the correction."""
    model = quantized(folder, base)
    return model, correct(model, folder, **options)


def load(folder: Path | str, **kwargs: Any) -> Any:
    """Load a model with plain transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """Return the logits of two fixed sequences, shape (2, 24, vocabulary)."""
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def gap(model: nn.Module, expected: Tensor) -> float:
    """Return the largest absolute difference between a model's logits and the expected logits."""
    return float((logits(model) - expected).abs().max())
