"""Measure the time that a correction adds in ONNX Runtime on the CPU, with shared and with per-module right factors.

python examples/benchmarks/onnx_runtime.py
python examples/benchmarks/onnx_runtime.py --hidden 256 --intermediate 512 --blocks 2 --decodes 20 --prefills 4 --json

The script quantizes a random Llama, attaches random factors of equal rank, and exports it with glowq: without factors,
with one right factor per group, and with one right factor per module. First only q, k and v have factors (2048 -> 2048,
512 and 512 by default), then every group has them. All graphs run in turns on one thread, and each measures a decode
step and a prompt, the fastest of three calls. The added time is the difference from the graph without factors in the
same turn.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from random_llama import add_size_arguments, attach_randomly, quantized
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoTokenizer

from glowq.factors.group import Group
from glowq.integrations.onnx.check import right_factor_nodes, run, session
from glowq.integrations.onnx.graph import describe, export_graph
from glowq.integrations.onnx.operators import use_operators
from glowq.models.tracing import find_groups

BUNDLED = Path(__file__).parents[1] / "stdlib-llama"
WARM_UP = 3
FASTEST_OF = 3


def main() -> None:
    """Print one row for each graph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_arguments(parser)
    parser.add_argument("--cached", type=int, default=64, help="tokens in the cache before the decoded token")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in a prompt")
    parser.add_argument("--decodes", type=int, default=500)
    parser.add_argument("--prefills", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    if arguments.json:
        print(json.dumps({"command": sys.argv, "onnxruntime": onnxruntime.__version__, "rows": rows}))
    else:
        show(rows, arguments)


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Export every graph and time them in turns."""
    torch.set_num_threads(1)
    model = quantized(arguments, folder)
    groups = find_groups(model, {"input_ids": torch.arange(8)[None]})
    attention = [group for group in groups if len(group.members) == 3]
    factors: dict[tuple[str, str], list[Group]] = {("", "base"): []}
    for name, chosen in (("q, k, v", attention), ("every group", groups)):
        factors[name, "shared"] = chosen
        factors[name, "per module"] = [single for group in chosen for single in group.apart()]
    calls: dict[tuple[str, str], tuple[Callable[[], Any], Callable[[], Any]]] = {}
    nodes = {}
    for key, chosen in factors.items():
        calls[key], nodes[key] = exported(copy.deepcopy(model), chosen, arguments, folder / "-".join(key))
    decode = timed([call[0] for call in calls.values()], arguments.decodes)
    prefill = timed([call[1] for call in calls.values()], arguments.prefills)
    rows: list[dict[str, Any]] = []
    for index, (corrected, factor) in enumerate(calls):
        row: dict[str, Any] = {
            "groups": corrected,
            "right_factor": factor,
            "right_factor_nodes": nodes[corrected, factor],
        }
        for kind, seconds in (("decode", decode), ("prefill", prefill)):
            row[f"{kind}_ms"] = quartiles(1e3 * seconds[:, index])
            row[f"{kind}_added_us"] = quartiles(1e6 * (seconds[:, index] - seconds[:, 0]) / arguments.blocks)
        rows.append(row)
    for shared, single in zip(rows[1::2], rows[2::2], strict=True):
        for kind in ("decode", "prefill"):
            shared[f"{kind}_of_per_module"] = shared[f"{kind}_added_us"][1] / single[f"{kind}_added_us"][1]
    return rows


def exported(
    model: nn.Module, groups: Sequence[Group], arguments: argparse.Namespace, folder: Path
) -> tuple[tuple[Callable[[], Any], Callable[[], Any]], int]:
    """Export `model` with random factors. Return calls for a decode step and a prompt, and the right-product count."""
    import onnx

    attach_randomly(model, groups, arguments.rank)
    use_operators(model)
    interface = describe(model, AutoTokenizer.from_pretrained(BUNDLED))
    folder.mkdir()
    export_graph(model, interface, folder)
    running = session(folder, threads=1)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph

    def call(cached: int, tokens: int) -> Callable[[], Any]:
        assert interface.cache is not None
        ids = torch.arange(tokens)[None] % 256
        mask = torch.ones(1, cached + tokens, dtype=torch.int64)
        inputs = [ids, mask, torch.arange(cached, cached + tokens)[None]]
        tensors = [*inputs, *interface.cache.tensors(1, cached)]
        return lambda: run(running, interface, tensors)

    counted = sum(rights for rights, _ in right_factor_nodes(graph, model).values())
    return (call(arguments.cached, 1), call(0, arguments.prompt)), counted


def timed(calls: Sequence[Callable[[], Any]], repeats: int) -> Tensor:
    """Return the seconds of every call in every turn, shape (repeats, calls). The order changes from turn to turn."""
    for call in [call for call in calls for _ in range(WARM_UP)]:
        call()
    seconds = torch.zeros(repeats, len(calls), dtype=torch.float64)
    for turn in range(repeats):
        for place in range(len(calls)):
            index = (turn + place) % len(calls)
            seconds[turn, index] = min(elapsed(calls[index]) for _ in range(FASTEST_OF))
    return seconds


def elapsed(call: Callable[[], Any]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def quartiles(values: Tensor) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    return torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist()


def show(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print the rows as a table."""
    title = (
        f"{arguments.base}, {arguments.blocks} blocks of width {arguments.hidden}, rank {arguments.rank}, ONNX Runtime "
        f"{onnxruntime.__version__}, one thread: median [quartiles]"
    )
    table = Table(title=title)
    times = ("decode ms", "added us a block", "prompt ms", "added us a block")
    for column in ("factors", "right factor", "nodes", *times, "of per module"):
        table.add_column(column, no_wrap=True, justify="right")
    for row in rows:
        cells = [row["groups"], row["right_factor"], str(row["right_factor_nodes"])]
        for kind in ("decode", "prefill"):
            cells.append("{1:.2f} [{0:.2f}, {2:.2f}]".format(*row[f"{kind}_ms"]))
            cells.append("{1:.0f} [{0:.0f}, {2:.0f}]".format(*row[f"{kind}_added_us"]))
        shares = [row[f"{kind}_of_per_module"] for kind in ("decode", "prefill") if f"{kind}_of_per_module" in row]
        table.add_row(*cells, ", ".join(f"{share:.2f}x" for share in shares))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
