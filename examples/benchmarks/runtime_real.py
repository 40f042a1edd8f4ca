"""Time a real model's base, glowq's correction, its per-module form and a PEFT adapter of the same factors, in turns.

python examples/benchmarks/runtime_real.py                      # SmolLM2-135M, which `make models` fetches
python examples/benchmarks/runtime_real.py --bases nf4 --modes eager --rank 32 --json

Each base is run eager and compiled, the latter with torch.compile(fullgraph=True) and a static cache. The factors are
those of `--method svd` at one rank, because the values do not change the times. The adapter is what `glowq export peft`
writes of them, attached to the same base with `PeftModel.from_pretrained`. All four models share the base's tensors and
one process, and take turns after every prompt and every token.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from glowq.artifact.request import CorrectionRequest
from glowq.evaluation.timing import Shape, machine, measure, variants
from glowq.integrations.export.registry import export
from glowq.integrations.transformers.checkpoint import correct_checkpoint
from glowq.runtime.fast_kernels import use_fast_kernels

MODEL = Path(__file__).resolve().parents[2] / "build" / "models" / "smollm2-135m"
PEFT = "PEFT"


def main() -> None:
    """Print a table for each base and mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a full-precision decoder (%(default)s)")
    parser.add_argument("--bases", default="nf4,torchao-int4")
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--rank", type=int, default=4, help="of every group (%(default)s: 3.4%% of SmolLM2's bytes)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in a prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens decoded after each prompt")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        print(f"skipped: there is no model in {arguments.model}; `make models` fetches SmolLM2-135M", file=sys.stderr)
        return
    torch.set_num_threads(arguments.threads)
    parts = []
    with redirect_stdout(sys.stderr):
        for base in arguments.bases.split(","):
            with tempfile.TemporaryDirectory() as folder:
                write(arguments, base, Path(folder))
                parts += [timed(arguments, base, mode, Path(folder)) for mode in arguments.modes.split(",")]
    if arguments.json:
        print(json.dumps({"command": sys.argv, "model": arguments.model.name, "rank": arguments.rank, "parts": parts}))
    else:
        for part in parts:
            show(part, arguments)


def write(arguments: argparse.Namespace, base: str, folder: Path) -> None:
    """Write the correction to folder/correction, and its PEFT adapter to folder/peft."""
    request = CorrectionRequest(
        rank=arguments.rank, method="svd", force=True, calibration="python-stdlib", calibration_tokens=1024
    )
    correct_checkpoint(str(arguments.model), folder / "correction", request=request, base=base, format="correction")
    export(str(folder / "correction"), "peft", folder / "peft")


def timed(arguments: argparse.Namespace, base: str, mode: str, folder: Path) -> dict[str, Any]:
    """Time the models of one base in one mode.

    Returns:
        "base", "mode", what `machine` describes, and the "rows" of `measure`. Each row also has "difference": how far
        its eager logits of a prompt are from those of the shared form, Frobenius norm, as a share of how far the base's
        are.
    """
    torch._dynamo.reset()
    model = AutoModelForCausalLM.from_pretrained(folder / "correction").eval()
    base_bytes = model.config.quantization_config.base_bytes
    if mode == "eager":  # torch.compile misses that a kernel rewrites its weight
        use_fast_kernels(model)
    models = variants(model)
    peft = PeftModel.from_pretrained(variants(model)["base"], folder / "peft", autocast_adapter_dtype=False).eval()
    adapter = [tensor for name, tensor in peft.named_parameters() if "lora_" in name]
    models[PEFT] = peft
    ids = torch.randint(model.config.vocab_size, (1, arguments.prompt), generator=torch.Generator().manual_seed(0))
    differences = differences_of(models, ids)
    options: dict[str, Any] = {"new_tokens": arguments.new_tokens, "repeats": arguments.repeats}
    rows = measure(models, [Shape(1, arguments.prompt)], base_bytes, compiled=mode == "compiled", **options)
    for row in rows:
        row["difference"] = differences[row["model"]]
        if row["model"] == PEFT:
            row["factor_bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in adapter)
            row["byte_ratio"] = row["factor_bytes"] / base_bytes
    return {"base": base, "mode": mode, **machine(model), "rows": rows}


@torch.no_grad()
def differences_of(models: dict[str, Any], ids: torch.Tensor) -> dict[str, float]:
    """How far each model's logits are from the shared form's, as a share of how far the base's are."""
    logits = {name: model(input_ids=ids, use_cache=False).logits.float() for name, model in models.items()}
    whole = (logits["base"] - logits["shared"]).norm()
    return {name: float((found - logits["shared"]).norm() / whole) for name, found in logits.items()}


def show(part: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print the rows of one base and mode as a table."""
    table = Table(
        title=f"{arguments.model.name}, {part['base']}, {part['mode']}, rank {arguments.rank}, prompt of "
        f"{arguments.prompt}, {part['dtype']}, torch {part['torch']}, {part['device']}, {part['threads']} threads: "
        "median [quartiles]",
        title_justify="left",
    )
    columns = ("model", "bytes added", "first token, ms", "added", "decode, ms", "added", "difference of logits")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in part["rows"]:
        cells = [row["model"], f"{row['byte_ratio']:.2%}"]
        for kind in ("first_token", "decode"):
            cells.append("{1:.2f} [{0:.2f}, {2:.2f}]".format(*(1e3 * seconds for seconds in row[kind])))
            cells.append(f"{row[f'{kind}_overhead']:+.1%}")
        table.add_row(*cells, f"{row['difference']:.1%}")
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


if __name__ == "__main__":
    main()
