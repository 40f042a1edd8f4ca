"""What a correction of 1% and 2% of the bytes gives back on every base, on held-out text.

python examples/benchmarks/backends.py
python examples/benchmarks/backends.py --bases nf4 gptq-3 --budgets 1% 4% --json
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import glowq
from glowq.backends import prepare_model
from glowq.data import read_texts, token_sequences
from glowq.evaluation import score_models
from glowq.runtime import attach
from glowq.selection import parse_budget

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from figures import figures  # noqa: E402

from bases import BASES, Base  # noqa: E402 - the matrix that the tests run

MODEL = ROOT / "examples" / "stdlib-llama"
LENGTH = 256


def main() -> None:
    """Print one row a base and budget."""
    bases = {base.name: base for base in BASES if base.installed}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=list(bases), choices=bases, metavar="BASE")
    parser.add_argument("--budgets", nargs="+", default=["1%", "2%"])
    parser.add_argument("--method", default="glowq")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=24576, help="held-out tokens that the figures are of")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with redirect_stdout(sys.stderr):
        rows = measure([bases[name] for name in arguments.bases], arguments)
    if arguments.json:
        print(json.dumps({"command": sys.argv, "seed": arguments.seed, "rows": rows}))
    else:
        show(rows, arguments)


def measure(bases: list[Base], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Correct and score every base at every budget; all figures are paired on the same sequences."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = {"python-stdlib": arguments.calibration_tokens, "python-stdlib:held-out": arguments.tokens}
    calibration, held_out = (
        token_sequences(read_texts(name), tokenizer, length=LENGTH, limit=limit, seed=arguments.seed)
        for name, limit in texts.items()
    )
    reference = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    rows = []
    for base in bases:
        model = base.load(dtype=torch.bfloat16, folder=MODEL)
        prepare_model(model)
        before = score_models({"reference": reference, "quantized": model}, held_out)
        largest = max(arguments.budgets, key=lambda budget: parse_budget(budget, 1 << 40))
        options = {"budget": largest, "method": arguments.method, "seed": arguments.seed}
        correction = glowq.correct(model, reference=str(MODEL), calibration=calibration, **options)
        for budget in arguments.budgets:
            glowq.detach(model)
            part = correction.cut(budget=budget)
            for entry in part.factors:
                attach(model, entry)
            after = score_models({"reference": reference, "corrected": model}, held_out)["corrected"]
            rows.append({"base": base.name, "budget": budget, **figures(before, after, part, arguments.seed)})
            print(rows[-1], file=sys.stderr)
    return rows


def show(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """The rows as a table."""
    table = Table(title=f"stdlib-llama, {arguments.tokens} held-out tokens, seed {arguments.seed}")
    for column in ("base", "bytes", "groups", "full", "quantized", "corrected", "recovered [95%]", "ratio [95%]"):
        table.add_column(column, no_wrap=True, justify="right")
    for row in rows:
        (low, high), (least, most) = row["recovered_ci95"], row["ppl_ratio_ci95"]
        table.add_row(
            row["base"],
            f"+{row['overhead']:.2%}",
            str(row["groups"]),
            *(f"{row[key]:.3f}" for key in ("reference", "quantized", "corrected")),
            f"{row['recovered']:.1%} [{low:.1%}, {high:.1%}]",
            f"{row['ppl_ratio']:.4f} [{least:.4f}, {most:.4f}]",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
