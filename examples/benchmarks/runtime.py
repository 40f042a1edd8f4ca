"""Measure the time that a correction adds to decoding and to a prompt, with shared and per-module right factors.

python examples/benchmarks/runtime.py
python examples/benchmarks/runtime.py --base nf4 --compile
python examples/benchmarks/runtime.py --hidden 256 --intermediate 128 --blocks 1 --new-tokens 4 --repeats 1 --json

The script quantizes a random Llama and attaches random factors: first to q, k and v only (2048 -> 2048, 512 and 512 by
default), then to every group. `glowq bench` measures the same on your own model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from random_llama import add_size_arguments, attach_randomly, quantized
from rich.console import Console
from rich.table import Table

from glowq.evaluation.timing import Shape, machine, measure, variants
from glowq.models.tracing import find_groups
from glowq.quantizers.model import packed_bytes
from glowq.runtime.attach import detach
from glowq.runtime.fast_kernels import use_fast_kernels


def main() -> None:
    """Print one row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_arguments(parser)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens in a prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens decoded after each prompt")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--factor-dtype", default="auto", help="also time both kinds with factors of this dtype")
    parser.add_argument("--exact", action="store_true", help="do not use kernels that rewrite the weights of the base")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = quantized(arguments, Path(folder), getattr(torch, arguments.dtype))
    if torch.cuda.is_available():
        model = model.cuda()
    base_bytes = packed_bytes(model)
    groups = find_groups(model, {"input_ids": torch.arange(8, device=model.device)[None]})
    if not arguments.exact and not arguments.compile:  # torch.compile misses that a kernel rewrites its weight
        use_fast_kernels(model)
    rows: list[dict[str, Any]] = []
    for name, chosen in (("q, k, v", [group for group in groups if len(group.members) == 3]), ("every group", groups)):
        attach_randomly(model, chosen, arguments.rank, model.dtype)
        rows += timed(name, model, base_bytes, arguments)
        detach(model)
    if arguments.json:
        print(json.dumps({"command": sys.argv, **machine(model), "rows": rows}))
    else:
        show(rows, machine(model), arguments)


def timed(name: str, model: Any, base_bytes: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the base and of the corrected models.

    The row of a shared right factor also has its added time as a share of the time that per-module right factors add.
    """
    rows = measure(
        variants(model, factor_dtype=arguments.factor_dtype),
        [Shape(arguments.batch, arguments.prompt)],
        base_bytes,
        new_tokens=arguments.new_tokens,
        repeats=arguments.repeats,
        compiled=arguments.compile,
        seed=arguments.seed,
    )
    for row in rows:
        row["groups"] = name
    for shared, single in zip(rows[1::2], rows[2::2], strict=True):
        for kind in ("first_token", "decode"):
            shared[f"{kind}_of_per_module"] = shared[f"{kind}_added"][1] / single[f"{kind}_added"][1]
    return rows


def show(rows: list[dict[str, Any]], where: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print the rows as a table."""
    how = "torch.compile" if arguments.compile else "eager"
    table = Table(
        title=f"{arguments.base}, {arguments.blocks} blocks of width {arguments.hidden}, rank {arguments.rank}, "
        f"{where['dtype']}, {how}, torch {where['torch']}, {where['device']}, {where['threads']} threads: "
        "median [quartiles]"
    )
    times = ("decode ms", "added us a block", "added", "prompt ms", "added us a block", "added")
    for column in ("groups", "right factor", "bytes added", *times, "of per module: decode", "prompt"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["groups"], row["model"], f"{row['byte_ratio']:.2%}"]
        for kind in ("decode", "first_token"):
            low, median, high = (1e6 * seconds / arguments.blocks for seconds in row[f"{kind}_added"])
            cells.append("{1:.2f} [{0:.2f}, {2:.2f}]".format(*(1e3 * seconds for seconds in row[kind])))
            cells += [f"{median:.0f} [{low:.0f}, {high:.0f}]", f"{row[f'{kind}_overhead']:+.1%}"]
        shares = [row.get(f"{kind}_of_per_module") for kind in ("decode", "first_token")]
        table.add_row(*cells, *("" if share is None else f"{share:.2f}" for share in shares))
    Console(width=None if sys.stdout.isatty() else 220, highlight=False).print(table)


if __name__ == "__main__":
    main()
