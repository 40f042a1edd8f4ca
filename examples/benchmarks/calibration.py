"""Measure how much calibration text a correction needs, and of which kinds: the same budget, corrected on other text.

python examples/benchmarks/calibration.py                  # SmolLM2-135M, which `make models` fetches
python examples/benchmarks/calibration.py --prose valid.txt --prose-data test.txt --bases torchao-int3 --json
python examples/benchmarks/calibration.py --texts prose:8192 prose:131072 prose+code:32768

A text is named by its kinds and its number of tokens, of which each kind gives an equal part. Prose is WikiText-2, code
is the Python standard library. Each correction is measured on held-out text of both kinds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from glowq.cli.reports.comparison_rows import figures
from glowq.data.tokens import sequences_of
from glowq.evaluation.timing import processor
from glowq.pipeline.compare.comparison import Comparison, compare_methods, score_entries
from glowq.quantizers.registry import base_config

MODEL = Path(__file__).resolve().parents[2] / "build" / "models" / "smollm2-135m"
WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"
AMOUNTS = (8192, 32768, 131072)
TEXTS = [f"{kinds}:{amount}" for kinds in ("prose", "code", "prose+code") for amount in AMOUNTS]
LENGTH = 512


def main() -> None:
    """Print one row for each base and text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a full-precision decoder (%(default)s)")
    parser.add_argument("--bases", nargs="+", default=["torchao-int3", "nf4"])
    parser.add_argument("--texts", nargs="+", default=TEXTS, help="KIND[+KIND]:TOKENS; default: %(default)s")
    parser.add_argument("--budget", default="3%")
    parser.add_argument("--factor-dtype", default="int4", choices=["int8", "int4", "int3"])
    parser.add_argument("--prose", default=f"{WIKITEXT}:validation", help="prose to calibrate on (%(default)s)")
    parser.add_argument("--prose-data", default=f"{WIKITEXT}:test", help="prose to measure on (%(default)s)")
    parser.add_argument("--tokens", type=int, default=6144, help="number of tokens of each kind to measure on")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        print(f"skipped: there is no model in {arguments.model}; `make models` fetches SmolLM2-135M", file=sys.stderr)
        return
    result = {"machine": processor(), "threads": torch.get_num_threads(), "budget": arguments.budget, "rows": []}
    for base in arguments.bases:
        result["rows"] += measure(arguments, base)
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result["rows"])


def measure(arguments: argparse.Namespace, base: str) -> list[dict[str, Any]]:
    """Correct one base on every text, and measure every correction on both kinds."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    sources = {"prose": arguments.prose, "code": "python-stdlib"}
    reports = {"prose": arguments.prose_data, "code": "python-stdlib:held-out"}
    size: dict[str, Any] = {"length": LENGTH, "limit": arguments.tokens}
    data = {kind: sequences_of(name, tokenizer, **size) for kind, name in reports.items()}
    reference = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    rows = []
    for text in arguments.texts:
        kinds, _, amount = text.partition(":")
        named = ",".join(sources[kind] for kind in kinds.split("+"))
        calibration = sequences_of(named, tokenizer, length=LENGTH, limit=int(amount))
        model = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=base_config(base))
        start = time.perf_counter()
        found = compare_methods(
            model,
            reference=str(arguments.model),
            calibration=calibration,
            methods=["glowq"],
            budgets=[arguments.budget],
            factor_dtypes=[arguments.factor_dtype],
        )
        row = {"base": base, "text": text, "tokens": calibration.numel(), "seconds": time.perf_counter() - start}
        entry = next(entry for entry in found.entries if entry.method == f"glowq+{arguments.factor_dtype}")
        row["predicted"] = entry.predicted
        for kind, report in data.items():
            scores = score_entries(reference, model, [entry], report)
            row[kind] = figures(Comparison([entry], found.base_bytes, None), scores, 0)["rows"][0]
        rows.append(row)
        told = ", ".join(f"{kind} {row[kind]['undone']:.1%}" for kind in data)
        print(f"{base}, {text}: {told} undone, {row['seconds']:.0f} s", file=sys.stderr, flush=True)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the share of the KL divergence undone on each kind of text, with its interval."""
    table = Table("base", "calibrated on", "prose undone", "code undone", "predicted", "seconds")
    for row in rows:
        cells = [f"{row[kind]['undone']:.1%} {_percent(row[kind]['undone_ci95'])}" for kind in ("prose", "code")]
        table.add_row(row["base"], row["text"], *cells, f"{row['predicted']:.1%}", f"{row['seconds']:.0f}")
    Console(width=120).print(table)


def _percent(interval: Any) -> str:
    return "" if interval is None else f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


if __name__ == "__main__":
    main()
