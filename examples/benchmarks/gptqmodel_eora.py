"""Compare glowq, and glowq's own `eora`, with the EoRA adapter that GPTQModel itself makes of the same GPTQ base.

python examples/benchmarks/gptqmodel_eora.py                  # SmolLM2-135M, which `make models` fetches
python examples/benchmarks/gptqmodel_eora.py --calibration valid.txt --data test.txt --ranks 4 --json

GPTQModel quantizes the model, and `GPTQModel.adapter.generate` makes an adapter of it, on the same text. The adapter is
read by `glowq.integrations.peft`, and is scored as a method. The bytes of the adapter are the budget of the others.
It needs gptqmodel (`pip install 'glowq[gptq]'`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

from glowq.cli.reports.comparison_rows import figures
from glowq.data.text import read_texts
from glowq.data.tokens import token_sequences
from glowq.evaluation.timing import processor
from glowq.integrations.peft.importer import import_adapter
from glowq.pipeline.compare.budgets import Entry
from glowq.pipeline.compare.comparison import Comparison, compare_methods, score_entries
from glowq.quantizers.model import prepare_model
from glowq.utils.processor import float32_is_faster

MODEL = Path(__file__).resolve().parents[2] / "build" / "models" / "smollm2-135m"
WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"
THEIRS = "eora of GPTQModel"
METHODS = ["eora", "glowq-published", "glowq"]


def main() -> None:
    """Print one row for each rank and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a full-precision decoder (%(default)s)")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="ranks of the adapters")
    parser.add_argument("--calibration", default=f"{WIKITEXT}:validation", help="text to calibrate on (%(default)s)")
    parser.add_argument("--data", default=f"{WIKITEXT}:test", help="text to measure on (%(default)s)")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=6144, help="number of tokens to measure on")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        print(f"skipped: there is no model in {arguments.model}; `make models` fetches SmolLM2-135M", file=sys.stderr)
        return
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    with redirect_stdout(sys.stderr):
        result = measure(arguments)
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantize, make the adapters, solve the other methods in their bytes, and score everything on the same text."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    sizes = {arguments.calibration: arguments.calibration_tokens, arguments.data: arguments.tokens}
    calibration, report = (
        token_sequences(read_texts(name), tokenizer, length=512, limit=limit) for name, limit in sizes.items()
    )
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        quantize(arguments, calibration, tokenizer, base)
        model = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=GPTQConfig(arguments.bits, backend="torch")
        )
        prepare_model(model)
        theirs, seconds = [], {}
        for rank in arguments.ranks:
            start = time.perf_counter()
            adapter = make_adapter(arguments, calibration, tokenizer, base, rank)
            seconds[rank] = time.perf_counter() - start
            correction = import_adapter(adapter, model)
            size = correction.factor_bytes
            theirs.append(Entry(THEIRS, "uniform", str(size), size, rank, tuple(correction.factors)))
        budgets = [entry.budget for entry in theirs]
        options: dict[str, Any] = {"methods": METHODS, "budgets": budgets, "factor_dtypes": ["int8", "int4", "int3"]}
        found = compare_methods(model, reference=str(arguments.model), calibration=calibration, **options)
        compared = Comparison([*theirs, *found.entries], found.base_bytes, None)
        reference = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
        scores = score_entries(reference, model, compared.entries, report)
    return {
        "model": arguments.model.name,
        "base": f"gptq, {arguments.bits} bits, groups of {arguments.group_size}",
        "base_bytes": found.base_bytes,
        **figures(compared, scores, 0),
        "adapter_seconds": seconds,
        "machine": processor(),
    }


def quantize(arguments: argparse.Namespace, calibration: Tensor, tokenizer: Any, target: Path) -> None:
    """Quantize the model with GPTQModel, and save it."""
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=arguments.bits, group_size=arguments.group_size, device="cpu", offload_to_disk=False)
    model = GPTQModel.load(str(arguments.model), config, dtype=fast_dtype())
    model.quantize(tokenizer.batch_decode(calibration), batch_size=1)
    model.save(str(target))


def make_adapter(arguments: argparse.Namespace, calibration: Tensor, tokenizer: Any, base: Path, rank: int) -> Path:
    """Let GPTQModel make an EoRA adapter of the quantized model, and return its folder.

    The steps are those of `GPTQModel.adapter.generate`, which loads both models in one dtype; but its quantized modules
    have no float32.
    """
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.adapter.adapter import Lora
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    target = base.with_name(f"eora-{rank}")
    options: dict[str, Any] = {"backend": BACKEND.GPTQ_TORCH, "device": "cpu"}
    quantized = GPTQModel.load(str(base), dtype=torch.bfloat16, **options)
    modules = {name: one for name, one in quantized.model.named_modules() if isinstance(one, TorchLinear)}
    model = GPTQModel.load(str(arguments.model), quantized.quantize_config, dtype=fast_dtype(), **options)
    model._eora_generate(
        adapter=Lora(path=str(target), rank=rank),
        quantized_modules=modules,
        calibration_dataset=tokenizer.batch_decode(calibration),
        batch_size=1,
    )
    return target


def fast_dtype() -> torch.dtype:
    """The dtype in which GPTQModel runs the model: float32 where this processor has no products of bfloat16."""
    return torch.float32 if float32_is_faster(torch.bfloat16) else torch.bfloat16


def show(result: dict[str, Any]) -> None:
    """Print the rows as a table."""
    reference, quantized = result["models"]
    table = Table(
        title=f"{result['model']}, {result['base']}: perplexity {reference['perplexity']:.2f}, quantized "
        f"{quantized['perplexity']:.2f}, KL divergence {quantized['kl']:.3f}",
        title_justify="left",
    )
    for column in ("method", "bytes added", "perplexity", "KL divergence", "undone [95% interval]"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in (row for row in result["rows"] if row["perplexity"] is not None):
        low, high = row["undone_ci95"] or (row["undone"],) * 2
        share = f"{row['undone']:.1%} [{low:.1%}, {high:.1%}]"
        cells = [row["method"], f"{row['overhead']:.2%}", f"{row['perplexity']:.2f}", f"{row['kl']:.4f}", share]
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


if __name__ == "__main__":
    main()
