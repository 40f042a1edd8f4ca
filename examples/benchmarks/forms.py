"""Measure the size on disk and the load time of every saved form of a corrected model.

python examples/benchmarks/forms.py
python examples/benchmarks/forms.py --base torchao-int4 --rank 16 --json

The forms load in turns in one process, after every form has been loaded once, so that all files are in the file cache.
The load time is a median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import glowq
from glowq.artifact.request import CorrectionRequest
from glowq.integrations.export.registry import export
from glowq.integrations.transformers.checkpoint import correct_checkpoint
from glowq.quantizers.registry import base_config

MODEL = Path(__file__).resolve().parents[1] / "stdlib-llama"


def main() -> None:
    """Print one row for each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="folder or Hub name of a full-precision decoder")
    parser.add_argument("--base", default="nf4")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--calibration", default="python-stdlib")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    if arguments.json:
        print(json.dumps({"command": sys.argv, "base": arguments.base, "rank": arguments.rank, "rows": rows}))
    else:
        show(rows, arguments)


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Write every form, then load all forms in turns, `repeats` times."""
    forms = write_forms(arguments, folder)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for load in forms.values():
        load()  # does the imports and fills the file cache
    for _ in range(arguments.repeats):
        for name, load in forms.items():
            start = time.perf_counter()
            load()
            seconds[name].append(time.perf_counter() - start)
    return [
        {
            "form": name,
            "bytes": weight_bytes(Path(arguments.model) if name == "full precision" else folder / name),
            "load_seconds": statistics.median(found),
            "load_seconds_all": found,
        }
        for name, found in seconds.items()
    ]


def write_forms(arguments: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Any]]:
    """Write every form to `folder/<form>` and return a function per form that loads it."""
    config, tokenizer = base_config(arguments.base), AutoTokenizer.from_pretrained(arguments.model)
    options = {"calibration": arguments.calibration, "calibration_tokens": arguments.calibration_tokens}
    request = CorrectionRequest(rank=arguments.rank, **options)
    for form in ("correction", "full"):
        output = folder / form
        correct_checkpoint(arguments.model, output, request=request, base=arguments.base, format=form)
    model = AutoModelForCausalLM.from_pretrained(folder / "full")
    glowq.detach(model)
    model.save_pretrained(folder / "quantized")
    tokenizer.save_pretrained(folder / "quantized")
    for target in ("peft", "merged", "onnx"):
        export(str(folder / "full"), target, folder / target)

    def transformers(name: str, **options: Any) -> Callable[[], Any]:
        return lambda: AutoModelForCausalLM.from_pretrained(name, **options)

    def onnx() -> Any:
        return onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])

    return {
        "full precision": transformers(arguments.model, dtype="auto"),
        "quantized": transformers(str(folder / "quantized")),
        "correction": transformers(str(folder / "correction")),
        "full": transformers(str(folder / "full")),
        "peft": transformers(str(folder / "peft"), quantization_config=config),
        "merged": transformers(str(folder / "merged"), dtype="auto"),
        "onnx": onnx,
    }


def weight_bytes(folder: Path) -> int:
    """Return the bytes of the files that hold weights."""
    names = ("*.safetensors", "*.onnx", "*.onnx.data")
    return sum(path.stat().st_size for pattern in names for path in folder.rglob(pattern))


def show(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print the rows as a table."""
    table = Table(title=f"{Path(arguments.model).name}, {arguments.base}, rank {arguments.rank}")
    for column in ("form", "bytes on disk", "load, s"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for row in rows:
        table.add_row(row["form"], f"{row['bytes']:,}", f"{row['load_seconds']:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
