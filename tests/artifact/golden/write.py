"""Write a correction in both forms, with floats, int8 and int4, by the glowq that Python finds; see README.md.

Usage, in an empty folder: python write.py NAME [base]. It writes NAME.zip. With `base` it writes the folder `base`, the
full-precision model, first; without it, that folder must be there.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import glowq

SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
IDS = torch.arange(1, 13)[None]
KEPT = ("config.json", "glowq.safetensors", "model.safetensors")


def quantized() -> Any:
    config = glowq.GlowQConfig(base="nf4", calibration=["unused"]).base
    return AutoModelForCausalLM.from_pretrained("base", quantization_config=config, dtype=torch.float32)


def write(folder: Path, model: Any, correction: Any) -> torch.Tensor:
    """Save both forms without what loading does not need, and return the logits of the corrected model."""
    correction.save_pretrained(folder / "correction")
    model.save_pretrained(folder / "full")
    for file in folder.rglob("*"):
        if file.is_file() and file.name not in KEPT:
            file.unlink()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found.float().contiguous()


def packed(target: Path) -> None:
    """Replace a folder by a zip file with the same files, whose bytes depend on nothing else."""
    with zipfile.ZipFile(target.with_name(f"{target.name}.zip"), "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for file in sorted(target.rglob("*")):
            if file.is_file():
                content = file.read_bytes().replace(str(Path("base").resolve()).encode(), b"base")
                archive.writestr(zipfile.ZipInfo(file.relative_to(target).as_posix()), content, zipfile.ZIP_DEFLATED)
    shutil.rmtree(target)


def main() -> None:
    target = Path(sys.argv[1])
    if "base" in sys.argv[2:]:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16().save_pretrained("base")
        Path("base", "generation_config.json").unlink()
    calibration = torch.randint(1, 32, (64, 16), generator=torch.Generator().manual_seed(0))
    model = quantized()
    correction = glowq.correct(model, reference="base", calibration=calibration, rank=2)
    logits = {"float": write(target / "float", model, correction)}
    for dtype in ("int8", "int4"):
        correction.rounded(dtype).save_pretrained(target / "rounded")
        model = quantized()
        logits[dtype] = write(target / dtype, model, glowq.load_correction(model, target / "rounded"))
        shutil.rmtree(target / "rounded")
    save_file(logits, target / "logits.safetensors")
    packed(target)


if __name__ == "__main__":
    main()
