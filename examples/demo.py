"""Quantize the bundled model, correct it, and show how much of the lost accuracy comes back. Run with `make demo`.

The calibration text is the Python standard library on this machine. The figures come from held-out files, which neither
the calibration nor the training of the model used.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import glowq
from glowq.data.text import read_texts
from glowq.data.tokens import token_sequences
from glowq.evaluation.figures import NO_GAP, has_gap
from glowq.evaluation.scores import Score, perplexity, recovered, score_models
from glowq.quantizers.registry import base_config

MODEL = str(Path(__file__).resolve().parent / "stdlib-llama")
PROMPT = "def read_file(path):\n    with open("
BASES = ("nf4", "torchao-int3")
REPEATS = 5


def main() -> None:
    """Correct the bundled model on each base and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bases", nargs="+", default=BASES, help="base quantizers, see `glowq correct --help`")
    parser.add_argument("--budget", default="6%", help="bytes for the factors (%(default)s)")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=24576, help="number of held-out tokens to evaluate on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()

    console = Console(width=max(96, Console().width))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = read_texts("python-stdlib")
    held_out = token_sequences(
        read_texts("python-stdlib:held-out"), tokenizer, length=256, limit=arguments.tokens, seed=arguments.seed
    )
    reference = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    full = score_models({"full precision": reference}, held_out)["full precision"]
    completions = {"full precision": complete(reference, tokenizer)}

    table = Table(title=f"stdlib-llama, perplexity on {held_out.numel()} held-out tokens, budget {arguments.budget}")
    for column in ("base", "full", "quantized", "corrected", "gap recovered", "bytes", "time"):
        table.add_column(column, no_wrap=True, justify="left" if column == "base" else "right")
    identical = {}
    for base in arguments.bases:
        with console.status(f"{base}: quantizing, correcting, measuring"):
            model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=base_config(base))
            correction = glowq.correct(
                model,
                reference=MODEL,
                calibration=texts,
                tokenizer=tokenizer,
                budget=arguments.budget,
                calibration_tokens=arguments.calibration_tokens,
                sequence_length=256,
                seed=arguments.seed,
            )
            with glowq.disabled(model):
                quantized = score(reference, model, held_out)
                completions[base] = complete(model, tokenizer)
            corrected = score(reference, model, held_out)
            completions[f"{base}, corrected"] = complete(model, tokenizer)
            table.add_row(*row(base, model, correction, [full, quantized, corrected], held_out))
            identical[base] = largest_difference_after_reload(model, correction, held_out[:4])
    console.print(table)
    for name, text in completions.items():
        console.print(f"[bold]{name}[/bold]: {text!r}", highlight=False)
    for base, difference in identical.items():
        console.print(
            f"{base}: saved, loaded with AutoModelForCausalLM.from_pretrained: max |logit difference| = {difference}"
        )


def score(reference: Any, model: Any, sequences: torch.Tensor) -> Score:
    """Return the score of the model against the reference model."""
    return score_models({"reference": reference, "model": model}, sequences)["model"]


def row(base: str, model: Any, correction: glowq.Correction, scores: list[Score], sequences: torch.Tensor) -> list[str]:
    """Return the row of one base for the table."""
    return [
        base,
        *(f"{perplexity(score):.3f}" for score in scores),
        share(scores),
        f"+{correction.overhead:.1%}",
        f"{time_added(model, sequences[:8]):+.0%}",
    ]


def share(scores: list[Score]) -> str:
    """Return the recovered share of the gap, with its interval, from the full, quantized and corrected scores."""
    full, quantized, _ = scores
    if not has_gap(perplexity(full), perplexity(quantized)):
        return NO_GAP
    interval = recovered(*scores)
    return f"{interval.value:.0%} [{interval.low:.0%}, {interval.high:.0%}]"


def time_added(model: Any, sequences: torch.Tensor) -> float:
    """Return the relative forward time that the correction adds: the median over pairs timed in turns."""
    ratios = []
    with torch.no_grad():
        model(sequences)
        for _ in range(REPEATS):
            with glowq.disabled(model):
                plain = seconds(model, sequences)
            ratios.append(seconds(model, sequences) / plain)
    return sorted(ratios)[REPEATS // 2] - 1


def seconds(model: Any, sequences: torch.Tensor) -> float:
    """Return the wall time of one forward, in seconds."""
    start = time.perf_counter()
    model(sequences)
    return time.perf_counter() - start


def complete(model: Any, tokenizer: Any) -> str:
    """Return the greedy completion of the prompt."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def largest_difference_after_reload(model: Any, correction: glowq.Correction, sequences: torch.Tensor) -> float:
    """Save the correction, load it with plain transformers, and return the largest difference of the logits."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        correction.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        return float((loaded(sequences).logits - model(sequences).logits).abs().max())


if __name__ == "__main__":
    main()
