"""Time the kernels, and measure the time and bytes that a correction adds to the quantized layers of an 8B Llama.

    python kernels/benchmarks/benchmark.py --rank 32 --json times.json
    python kernels/benchmarks/benchmark.py --interpret    # a smoke run without a GPU: its times mean nothing

The script first checks every system against plain torch. Then it times all calls in turns, one repetition of each at a
time, and flushes the cache before each. The systems are the base alone, the base with a right factor that its members
share (in bfloat16, in int8, and in separate launches), and the base with a right factor of the same rank for each
member. Bytes and time of a correction are relative to those of the base.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "torch-ext"))
import glowq_kernels
from glowq_kernels import twins

# Group -> input channels and the outputs of its members.
LLAMA_8B = {
    "q, k, v": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate, up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
SMALL = {"q, k, v": (256, (64, 32, 32)), "down": (384, (96,))}
GROUP_SIZE, BLOCKSIZE = 128, 64
FLUSH = 256 * 2**20  # bytes, more than the last-level cache of any GPU

Call = Callable[[], object]


@dataclass
class Layer:
    """A quantized layer of stacked members with random factors, and tokens for it.

    Attributes:
        linear: `gptq_linear` or `nf4_linear` with its weight as arguments; takes x and a correction.
        twin: the same function in plain torch.
        base_bytes: bytes of the packed weight, its scales and its other tensors.
        outputs: for each member, the slice of its outputs.
        rights: a right factor for each member; the first is also the shared one.
    """

    x: Tensor
    linear: Callable[..., Tensor]
    twin: Callable[..., Tensor]
    base_bytes: int
    outputs: list[slice]
    rights: list[Tensor]
    left: Tensor

    def shared_bytes(self) -> int:
        """Bytes of one right factor and all left factors."""
        return size(self.rights[0]) + size(self.left)

    def int8_bytes(self) -> int:
        """Bytes of one right factor and all left factors in int8, with one scale per row."""
        return sum(map(size, (*rounded(self.rights[0]), *rounded(self.left))))

    def member_bytes(self) -> int:
        """Bytes of a right factor for each member and all left factors."""
        return sum(size(right) for right in self.rights) + size(self.left)


def size(tensor: Tensor) -> int:
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def rounded(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return a factor in int8, and one scale per row in float32."""
    scale = factor.float().abs().amax(1) / 127
    return (factor.float() / scale[:, None]).round().to(torch.int8), scale


def make_layer(
    layout: str, inputs: int, members: tuple[int, ...], tokens: int, rank: int, device: torch.device
) -> Layer:
    """A random layer of bfloat16 inputs and factors."""
    outputs = sum(members)
    if layout == "gptq":
        groups = inputs // GROUP_SIZE
        tensors = {
            "qweight": words(inputs // 8, outputs, device=device),
            "qzeros": words(groups, outputs // 8, device=device),
            "scales": (torch.rand(groups, outputs, device=device) / 100).half(),
        }
        options: dict[str, Any] = {"group_size": GROUP_SIZE}
    else:
        count = inputs * outputs
        tensors = {
            "qweight": torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8, device=device),
            "absmax": torch.rand(count // BLOCKSIZE, device=device) / 10,
            "code": torch.linspace(-1, 1, 16, device=device),
        }
        options = {"blocksize": BLOCKSIZE, "out_features": outputs}
    ends = [sum(members[: index + 1]) for index in range(len(members))]
    linear, twin = (
        partial(getattr(package, f"{layout}_linear"), **tensors, **options) for package in (glowq_kernels, twins)
    )
    return Layer(
        x=torch.randn(tokens, inputs, device=device).bfloat16(),
        linear=linear,
        twin=twin,
        base_bytes=sum(size(tensor) for tensor in tensors.values()),
        outputs=[slice(end - width, end) for end, width in zip(ends, members, strict=True)],
        rights=[(torch.randn(rank, inputs, device=device) / inputs**0.5).bfloat16() for _ in members],
        left=(torch.randn(outputs, rank, device=device) / rank**0.5).bfloat16(),
    )


def words(*shape: int, device: torch.device) -> Tensor:
    """Random packed words, int32."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)


def calls(layer: Layer) -> tuple[dict[str, Call], dict[str, Call]]:
    """Return the calls to time: the systems, and each kernel with its equivalents in plain torch."""
    x, left, shared = layer.x, layer.left, layer.rights[0]
    product, output = glowq_kernels.right(x, shared), layer.linear(x)
    dense = torch.randn(left.shape[0], x.shape[1], device=x.device).bfloat16()
    (right_int8, right_scale), (left_int8, left_scale) = rounded(shared), rounded(left)

    def apart() -> Tensor:
        result = layer.linear(x)
        glowq_kernels.left_add_(result, glowq_kernels.right(x, shared), left)
        return result

    def in_int8() -> Tensor:
        product = glowq_kernels.right(x, right_int8, right_scale)
        return layer.linear(x, product=product, left=left_int8, left_scale=left_scale)

    def per_member() -> Tensor:
        result = layer.linear(x)
        for part, right in zip(layer.outputs, layer.rights, strict=True):
            glowq_kernels.left_add_(result[:, part], glowq_kernels.right(x, right), left[part])
        return result

    systems: dict[str, Call] = {
        "base": lambda: layer.linear(x),
        "base + shared": lambda: layer.linear(x, product=glowq_kernels.right(x, shared), left=left),
        "base + shared, int8": in_int8,
        "base + shared, apart": apart,
        "base + per member": per_member,
    }
    kernels: dict[str, Call] = {
        "right": lambda: glowq_kernels.right(x, shared),
        "right, int8": lambda: glowq_kernels.right(x, right_int8, right_scale),
        "right, twin": lambda: twins.right(x, shared),
        "right, F.linear": lambda: F.linear(x, shared),
        "left_add_": lambda: glowq_kernels.left_add_(output, product, left),
        "left_add_, int8": lambda: glowq_kernels.left_add_(output, product, left_int8, left_scale),
        "left_add_, twin": lambda: twins.left_add_(output, product, left),
        "left_add_, addmm_": lambda: output.addmm_(product, left.T),
        "linear, twin": lambda: layer.twin(x),
        "bfloat16 weight, F.linear": lambda: F.linear(x, dense),
    }
    return systems, kernels


def check(layer: Layer, systems: dict[str, Call]) -> None:
    """Exit with a message if a system computes a different result from plain torch."""
    x, left = layer.x, layer.left
    base = layer.twin(x).float()
    shared = base + x.float() @ layer.rights[0].float().T @ left.float().T
    members = base.clone()
    for part, right in zip(layer.outputs, layer.rights, strict=True):
        members[:, part] += x.float() @ right.float().T @ left[part].float().T
    expected = {"base": base, "base + per member": members}
    for name, call in systems.items():
        wanted = expected.get(name, shared)
        error = float((call().float() - wanted).norm() / wanted.norm())  # type: ignore[attr-defined]
        if not error < 0.02:  # product and output are each rounded to bfloat16, by 0.4% (interpreter: 0.8%)
            sys.exit(f"{name} is wrong by {error:.1%}; its time would mean nothing.")


class Clock:
    """Measures the microseconds of one call with a cold cache."""

    def __init__(self, device: torch.device) -> None:
        self.library = None if device.type == "cpu" else getattr(torch, device.type)
        self.cache = torch.empty(FLUSH if self.library else 0, dtype=torch.int8, device=device)

    def __call__(self, call: Call) -> float:
        if self.library is None:
            start = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - start)
        events = [self.library.Event(enable_timing=True) for _ in range(2)]
        self.cache.zero_()  # while the GPU runs this, the host already launches the call
        events[0].record()
        call()
        events[1].record()
        self.library.synchronize()
        return 1e3 * float(events[0].elapsed_time(events[1]))


def graphs(several: dict[str, Call]) -> dict[str, Call]:
    """Return each call as a CUDA graph, whose time excludes the launch work of the host; empty without CUDA."""
    if not torch.cuda.is_available():
        return {}
    captured: dict[str, Call] = {}
    for name, call in several.items():
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        captured[name] = graph.replay
    return captured


def interleaved(clock: Clock, several: dict[str, Call], repeats: int) -> dict[str, list[float]]:
    """Return the microseconds of each call. Each turn makes every call once; the first two turns are not counted."""
    times: dict[str, list[float]] = {name: [] for name in several}
    for turn in range(-2, repeats):
        for name, call in several.items():
            elapsed = clock(call)
            if turn >= 0:
                times[name].append(elapsed)
    return times


def rows(layer: Layer, clock: Clock, repeats: int) -> list[dict[str, Any]]:
    """Return one row per call and launch mode: quartiles, and bytes and time relative to the base."""
    systems, kernels = calls(layer)
    check(layer, systems)
    extra = {"base": 0, "base + shared, int8": layer.int8_bytes(), "base + per member": layer.member_bytes()}
    result = []
    for launch, several in (("eager", {**systems, **kernels}), ("graph", graphs({**systems, **kernels}))):
        times = interleaved(clock, several, repeats)
        for name, microseconds in times.items():
            first, middle, last = statistics.quantiles(microseconds, n=4)
            row: dict[str, Any] = {"launch": launch, "name": name, "median": middle, "quartiles": [first, last]}
            if name in systems:
                row["bytes_ratio"] = extra.get(name, layer.shared_bytes()) / layer.base_bytes
                row["time_ratio"] = middle / statistics.median(times["base"]) - 1
            result.append(row)
    return result


def print_rows(title: str, found: list[dict[str, Any]]) -> None:
    """Print what `rows` returned, as a table."""
    print(f"\n{title}\n{'':<7}{'':<27}{'median us':>10}{'quartiles us':>24}{'+ bytes':>9}{'+ time':>9}")
    for row in found:
        quartiles = f"{row['quartiles'][0]:.1f} to {row['quartiles'][1]:.1f}"
        ratios = f"{row['bytes_ratio']:>9.1%}{row['time_ratio']:>9.1%}" if "time_ratio" in row else ""
        print(f"{row['launch']:<7}{row['name']:<27}{row['median']:>10.1f}{quartiles:>24}{ratios}")


def main() -> None:
    """Time every layer, print its rows, and write them to the file of --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write every row to this file too")
    parser.add_argument("--interpret", action="store_true", help="small shapes in triton's interpreter, on the CPU")
    args = parser.parse_args()
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, at their first launch
    elif os.environ.pop("TRITON_INTERPRET", None):
        sys.exit("TRITON_INTERPRET is set, and the interpreter's times mean nothing; unset it, or pass --interpret.")
    reason = glowq_kernels.unavailable()
    if reason is not None:
        sys.exit(f"Nothing to time: {reason} With --interpret this script makes a smoke run.")
    torch.manual_seed(0)
    library = None if args.interpret else torch.cuda if torch.cuda.is_available() else torch.xpu
    device = torch.device("cpu" if library is None else library.__name__.rpartition(".")[2])
    shapes, repeats = (SMALL, 2) if library is None else (LLAMA_8B, args.repeats)
    name = "interpreter: times mean nothing" if library is None else library.get_device_name()
    print(f"{name}; torch {torch.__version__}, rank {args.rank}, bfloat16, {repeats} repetitions in turns")

    clock, report = Clock(device), []
    for group, (inputs, members) in shapes.items():
        for layout in ("gptq", "nf4"):
            for tokens in args.tokens:
                found = rows(make_layer(layout, inputs, members, tokens, args.rank, device), clock, repeats)
                print_rows(f"{group}: {inputs} -> {sum(members)}, {layout}, {tokens} tokens", found)
                setting = {"group": group, "inputs": inputs, "outputs": list(members), "layout": layout}
                report += [{**setting, "tokens": tokens, **row} for row in found]
    if args.json:
        about = {"device": name, "torch": torch.__version__, "rank": args.rank, "unit": "us", "rows": report}
        args.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
