"""What a correction adds to a decoded token and to a prompt: a shared right factor, and one right factor a module.

python examples/benchmarks/runtime.py
python examples/benchmarks/runtime.py --base nf4 --compile
python examples/benchmarks/runtime.py --hidden 256 --intermediate 128 --blocks 1 --new-tokens 4 --repeats 1 --json

A random Llama is quantized and given random factors: first q, k and v alone (2048 -> 2048, 512 and 512 by default),
then every group. `glowq bench` times the same on a model of yours.
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
    """Print one row a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_arguments(parser)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens decoded after each prompt")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--int8", action="store_true", help="time both with factors in int8, too")
    parser.add_argument("--exact", action="store_true", help="without kernels that rewrite the base's weights")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = quantized(arguments, Path(folder), getattr(torch, arguments.dtype))
    if torch.cuda.is_available():
        model = model.cuda()
    base_bytes = packed_bytes(model)
    groups = find_groups(model, {"input_ids": torch.arange(8, device=model.device)[None]})
    if not arguments.exact and not arguments.compile:  # torch.compile does not see a kernel rewrite its weight
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
    """The rows of the base and of both corrected models, and what the shared one adds of what the other adds."""
    rows = measure(
        variants(model, int8=arguments.int8),
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
    """The rows as a table."""
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
