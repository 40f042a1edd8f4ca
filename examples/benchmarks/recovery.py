"""How much of the perplexity gap each method recovers on the bundled model, at one rank, on held-out text.

python examples/benchmarks/recovery.py
python examples/benchmarks/recovery.py --bases torchao-int3 --methods glowq qera --rank 32 --json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from figures import figures
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import glowq
from glowq.backends import base_config, prepare_model
from glowq.data import read_texts, token_sequences
from glowq.evaluation import score_models

MODEL = str(Path(__file__).resolve().parents[1] / "stdlib-llama")


def main() -> None:
    """Print one row a base and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=["nf4", "torchao-int4", "torchao-int3", "torchao-int2"])
    parser.add_argument("--methods", nargs="+", default=["glowq", "svd"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=49152, help="held-out tokens that the figures are of")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measure(arguments)
    if arguments.json:
        print(json.dumps({"command": sys.argv, "seed": arguments.seed, "rows": rows}))
    else:
        show(rows, arguments)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Correct and score every base with every method; all figures are paired on the same sequences."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = read_texts("python-stdlib")
    sequences = token_sequences(
        read_texts("python-stdlib:held-out"), tokenizer, length=256, limit=arguments.tokens, seed=arguments.seed
    )
    reference = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    rows = []
    for base in arguments.bases:
        model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=base_config(base))
        prepare_model(model)
        before = score_models({"reference": reference, "quantized": model}, sequences)
        for method in arguments.methods:
            correction = glowq.correct(
                model,
                reference=MODEL,
                calibration=texts,
                tokenizer=tokenizer,
                rank=arguments.rank,
                method=method,
                calibration_tokens=arguments.calibration_tokens,
                sequence_length=256,
                seed=arguments.seed,
            )
            after = score_models({"reference": reference, "corrected": model}, sequences)["corrected"]
            glowq.detach(model)
            row = {"base": base, "method": method, "rank": arguments.rank, "tokens": sequences.numel()}
            rows.append({**row, **figures(before, after, correction, arguments.seed)})
    return rows


def show(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """The rows as a table."""
    title = f"stdlib-llama, rank {arguments.rank}, {rows[0]['tokens']} held-out tokens, seed {arguments.seed}"
    table = Table(title=title)
    for column in ("base", "method", "full", "quantized", "corrected", "recovered [95%]", "KL", "bytes"):
        table.add_column(column, no_wrap=True, justify="right")
    for row in rows:
        low, high = row["recovered_ci95"]
        table.add_row(
            row["base"],
            row["method"],
            *(f"{row[key]:.3f}" for key in ("reference", "quantized", "corrected")),
            f"{row['recovered']:.1%} [{low:.1%}, {high:.1%}]",
            f"{row['kl_quantized']:.4f} -> {row['kl_corrected']:.4f}",
            f"+{row['overhead']:.1%}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
