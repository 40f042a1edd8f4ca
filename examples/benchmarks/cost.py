"""Measure the time of a correction relative to its calibration forwards, and its memory on top of the imports.

python examples/benchmarks/cost.py
python examples/benchmarks/cost.py --base torchao-int3 --calibration-tokens 32768 --json
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import glowq
from glowq.data.inputs import batches
from glowq.data.text import read_texts
from glowq.data.tokens import token_sequences
from glowq.quantizers.model import prepare_model
from glowq.quantizers.registry import base_config

MODEL = Path(__file__).resolve().parents[1] / "stdlib-llama"
BATCH = 16
MARGIN = 500_000_000


def main() -> None:
    """Measure one base in this process. Use a new process for each base, because peak memory counts per process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="folder or Hub name of a full-precision decoder")
    parser.add_argument("--base", default="nf4")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--distill", type=int, default=0, metavar="STEPS", help="distillation steps, part of the time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="with one thread, scheduling does not change the ratio")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures = {"command": sys.argv, "threads": torch.get_num_threads(), **measure(arguments)}
    if arguments.json:
        print(json.dumps(figures))
        return
    print(
        f"{figures['base']}: correction {figures['correction_seconds']:.2f} s, its calibration forwards "
        f"{figures['forward_seconds']:.2f} s: {figures['ratio']:.2f}x\n"
        f"peak memory above the imports {figures['peak_bytes'] / 1e6:.0f} MB; quantized model + reference's largest "
        f"block + 500 MB = {figures['allowed_bytes'] / 1e6:.0f} MB"
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Alternate calibration forwards and corrections of one model, and return the medians."""
    config = base_config(arguments.base)
    baseline = psutil.Process().memory_info().rss
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    sequences = token_sequences(
        read_texts("python-stdlib"), tokenizer, length=256, limit=arguments.calibration_tokens, seed=0
    )
    model = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=config)
    prepare_model(model)
    ratios, corrections, forwards = [], [], []
    for _ in range(arguments.repeats):
        forwards.append(forward_seconds(model, sequences))
        start = time.perf_counter()
        options = {"rank": arguments.rank, "distill": arguments.distill}
        glowq.correct(model, reference=arguments.model, calibration=sequences, **options)
        corrections.append(time.perf_counter() - start)
        ratios.append(corrections[-1] / forwards[-1])
        glowq.detach(model)
    middle = arguments.repeats // 2
    stored = sum(p.untyped_storage().nbytes() for p in model.parameters())
    return {
        "base": arguments.base,
        "tokens": sequences.numel(),
        "distill": arguments.distill,
        "correction_seconds": sorted(corrections)[middle],
        "forward_seconds": sorted(forwards)[middle],
        "ratio": sorted(ratios)[middle],
        "ratios": ratios,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - baseline,
        "allowed_bytes": stored + largest_block_bytes(arguments.model) + MARGIN,
    }


def forward_seconds(model: Any, sequences: torch.Tensor) -> float:
    """Return the seconds of one forward of the quantized model over all calibration sequences."""
    start = time.perf_counter()
    with torch.no_grad():
        for batch in batches(sequences, BATCH):
            model(**batch, use_cache=False)
    return time.perf_counter() - start


def largest_block_bytes(name: str) -> int:
    """Return the bytes of the largest decoder layer of the full-precision model."""
    reference = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    layers = reference.model.layers
    return max(sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers)


if __name__ == "__main__":
    main()
