"""What a correction of 1% and 2% of the bytes gives back on every base, on held-out text.

python examples/benchmarks/backends.py
python examples/benchmarks/backends.py --bases nf4 gptq-3 --budgets 1% 4% --json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import glowq
from glowq.backends import base_config, base_names, prepare_model, with_calibration
from glowq.data import read_texts, token_sequences
from glowq.evaluation import perplexity, perplexity_ratio, recovered, score_models

MODEL = str(Path(__file__).resolve().parents[1] / "stdlib-llama")
LENGTH = 256


def main() -> None:
    """Print one row a base and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=base_names())
    parser.add_argument("--budgets", nargs="+", default=["1%", "2%"])
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
    """Correct and score every base at every budget; all figures are paired on the same sequences."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    calibration, held_out = (
        token_sequences(read_texts(source), tokenizer, length=LENGTH, limit=limit, seed=arguments.seed)
        for source, limit in (
            ("python-stdlib", arguments.calibration_tokens),
            ("python-stdlib:held-out", arguments.tokens),
        )
    )
    reference = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    full = score_models({"reference": reference}, held_out)["reference"]
    rows = []
    for base in arguments.bases:
        config = glowq.GlowQConfig(base=with_calibration(base_config(base), calibration), correction="none")
        rows.extend(measure_base(base, config, reference, full, calibration, held_out, arguments))
    return rows
