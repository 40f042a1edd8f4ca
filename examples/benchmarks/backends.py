"""Compare glowq with the published GlowQ on every base, at equal bytes, on held-out text.

python examples/benchmarks/backends.py
python examples/benchmarks/backends.py --bases nf4 gptq-3 --budgets 1% 4% --json

262,144 bytes are the size of rank-4 factors for every group of the bundled model. By default
8-bit bases are left out, because they have no gap to recover.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from glowq.data.text import read_texts
from glowq.data.tokens import token_sequences
from glowq.evaluation.intervals import bootstrap
from glowq.evaluation.scores import Score, perplexity, perplexity_ratio, recovered
from glowq.pipeline.compare.budgets import Entry
from glowq.pipeline.compare.comparison import compare_methods, score_entries
from glowq.quantizers.model import prepare_model

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.bases import BASES, Base  # noqa: E402 - the matrix that the tests run

MODEL = ROOT / "examples" / "stdlib-llama"
LENGTH = 256
METHODS = ["glowq-published", "glowq"]


def main() -> None:
    """Print one row for each base, budget and method."""
    bases = {base.name: base for base in BASES if base.installed}
    default = [name for name in bases if "8" not in name]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="folder of a full-precision decoder")
    parser.add_argument("--bases", nargs="+", default=default, choices=bases, metavar="BASE")
    parser.add_argument("--budgets", nargs="+", default=["1%", "2%", "262144"])
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=16384, help="number of held-out tokens to evaluate on")
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
    """Correct and score every base at every budget. All figures use the same held-out sequences."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = {"python-stdlib": arguments.calibration_tokens, "python-stdlib:held-out": arguments.tokens}
    calibration, held_out = (
        token_sequences(read_texts(name), tokenizer, length=LENGTH, limit=limit, seed=arguments.seed)
        for name, limit in texts.items()
    )
    reference = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    rows = []
    for base in bases:
        model = base.load(dtype=torch.bfloat16, folder=arguments.model)
        prepare_model(model)
        options = {"methods": METHODS, "budgets": arguments.budgets, "seed": arguments.seed}
        found = compare_methods(model, reference=arguments.model, calibration=calibration, **options)
        scores = score_entries(reference, model, found.entries, held_out)
        for entry in found.entries:
            if entry.factors:
                row = {"base": base.name, "method": entry.method, "budget": entry.budget, "rank": entry.rank}
                overhead = entry.factor_bytes / found.base_bytes
                measured = figures(scores, scores[entry.label], len(entry.factors), overhead, arguments.seed)
                rows.append({**row, **measured, **against_published(scores, entry, arguments.seed)})
                print(rows[-1], file=sys.stderr)
    return rows


def figures(scores: Mapping[str, Score], after: Score, groups: int, overhead: float, seed: int) -> dict[str, Any]:
    """Return the figures of one row, with 95% bootstrap intervals over sequences."""
    full, quantized = scores["reference"], scores["quantized"]
    share, ratio = recovered(full, quantized, after, seed=seed), perplexity_ratio(quantized, after, seed=seed)
    return {
        **{name: perplexity(score) for name, score in (("reference", full), ("quantized", quantized))},
        "corrected": perplexity(after),
        "recovered": share.value,
        "recovered_ci95": [share.low, share.high],
        "ppl_ratio": ratio.value,
        "ppl_ratio_ci95": [ratio.low, ratio.high],
        "kl_quantized": float(quantized.kl.mean()),
        "kl_corrected": float(after.kl.mean()),
        "groups": groups,
        "overhead": overhead,
    }


def against_published(scores: Mapping[str, Score], entry: Entry, seed: int) -> dict[str, Any]:
    """Return the KL of this entry minus that of the published method at the same budget, nats, with 95% interval."""
    published = scores.get(replace(entry, method="glowq-published").label)
    if published is None or entry.method == "glowq-published":
        return {}
    difference = scores[entry.label].kl - published.kl
    found = bootstrap(lambda means: means[..., 0], difference[:, None], seed=seed)
    return {"kl_less": found.value, "kl_less_ci95": [found.low, found.high]}


def show(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print the rows as a table."""
    table = Table(title=f"{Path(arguments.model).name}, {arguments.tokens} held-out tokens, seed {arguments.seed}")
    columns = ("base", "method", "bytes", "groups", "full", "quantized", "corrected", "recovered [95%]", "ratio [95%]")
    for column in (*columns, "KL minus published [95%], 1e-3 nats"):
        table.add_column(column, no_wrap=True, justify="right")
    for row in rows:
        (low, high), (least, most) = row["recovered_ci95"], row["ppl_ratio_ci95"]
        less = [1e3 * value for value in (row["kl_less"], *row["kl_less_ci95"])] if "kl_less" in row else None
        table.add_row(
            row["base"],
            row["method"],
            f"+{row['overhead']:.2%}",
            str(row["groups"]),
            *(f"{row[key]:.3f}" for key in ("reference", "quantized", "corrected")),
            f"{row['recovered']:.1%} [{low:.1%}, {high:.1%}]",
            f"{row['ppl_ratio']:.4f} [{least:.4f}, {most:.4f}]",
            "" if less is None else "{:.2f} [{:.2f}, {:.2f}]".format(*less),
        )
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
