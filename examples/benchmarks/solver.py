"""Compare the time of glowq's solver with that of the published method, on the same data, in one process, in turns.

    python examples/benchmarks/solver.py --d 4096 --outputs 6144 --rank 64

The published method (GlowQ, arXiv 2603.25385, sec. 3, implemented from its equations) shrinks S by 5%, computes
S^(1/2) and S^(-1/2) from a float64 eigendecomposition, reduces E S^(1/2) by QR, computes a randomized SVD and maps the
right factor back. Here only the eigendecomposition runs in float64. The rest runs in float32, which makes the published
method faster.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from glowq.solving.low_rank import Factors, factorize, weighted_error

_OVERSAMPLING = 8


def make_layer(inputs: int, outputs: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return a 3-bit rounding error E (O, d), float32, and the moment S (d, d), float64, of inputs with outliers."""
    generator = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, inputs + 1, dtype=torch.float32).rsqrt()
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    tokens_in = (torch.randn(tokens, inputs, generator=generator) * decay) @ mixing
    outliers = torch.randperm(inputs, generator=generator)[: max(1, inputs // 500)]
    tokens_in[:, outliers] *= 30
    moment = (tokens_in.T @ tokens_in).double() / tokens
    weight = torch.randn(outputs, inputs, generator=generator)
    weight *= torch.exp(0.5 * torch.randn(outputs, 1, generator=generator))
    weight *= torch.exp(0.3 * torch.randn(1, inputs, generator=generator))
    groups = weight.view(outputs, -1, min(128, inputs))
    low = groups.amin(2, keepdim=True)
    step = (groups.amax(2, keepdim=True) - low) / 7
    rounded = ((groups - low) / step).round() * step + low
    return (groups - rounded).view(outputs, inputs), moment


def published(error: Tensor, moment: Tensor, rank: int) -> Factors:
    """Solve with the method of the paper: square root and inverse square root of the shrunk moment."""
    shrunk = 0.95 * moment
    shrunk.diagonal().add_(0.05 * moment.diagonal().mean())
    values, vectors = torch.linalg.eigh(shrunk)
    roots, frame = values.float().sqrt(), vectors.float()
    root, inverse = (frame * roots) @ frame.T, (frame / roots) @ frame.T
    orthogonal, reduced = torch.linalg.qr(error @ root)
    left, singular, right = torch.svd_lowrank(reduced, q=rank + _OVERSAMPLING, niter=2)
    scaled = singular[:rank, None] * right[:, :rank].T
    total = float(reduced.double().square().sum())
    return Factors(orthogonal @ left[:, :rank], scaled @ inverse, singular[:rank].double().square(), total)


def optimum(error: Tensor, moment: Tensor, rank: int) -> float:
    """Return the smallest possible weighted residual at this rank, computed in float64.

    It is the sum of the discarded eigenvalues of S^(1/2) E^T E S^(1/2).
    """
    values, vectors = torch.linalg.eigh(moment)
    half = error.double() @ (vectors * values.clamp_min(0).sqrt())
    gram = half.T @ half if half.shape[0] >= half.shape[1] else half @ half.T
    return float(torch.linalg.eigvalsh(gram).flip(0)[rank:].sum())


def processor() -> str:
    """Return the name of the processor if the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def timed(solve: Callable[[], Factors]) -> tuple[float, Factors]:
    start = time.perf_counter()
    factors = solve()
    return time.perf_counter() - start, factors


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d", type=int, default=4096, help="inputs of the group; a multiple of 128, or less than 128")
    parser.add_argument("--outputs", type=int, default=6144, help="stacked outputs of the group")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192, help="number of calibration tokens in the moment")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()

    error, moment = make_layer(args.d, args.outputs, args.tokens, args.seed)
    torch.manual_seed(args.seed)  # torch.svd_lowrank takes no generator
    solvers: dict[str, Callable[[], Factors]] = {
        "published": lambda: published(error, moment, args.rank),
        "glowq": lambda: factorize(error, moment, args.rank, seed=args.seed),
    }
    solvers["glowq"]()  # the first matrix product of a process also starts the thread pool
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    results: dict[str, Factors] = {}
    for _ in range(args.repeats):
        for name, solve in solvers.items():
            elapsed, results[name] = timed(solve)
            seconds[name].append(elapsed)
    best = optimum(error, moment, args.rank)
    excess = {name: weighted_error(error, results[name], moment) / best - 1 for name in solvers}
    report = {
        "inputs": args.d,
        "outputs": args.outputs,
        "rank": args.rank,
        "tokens": args.tokens,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": seconds,
        "speedup": statistics.median(seconds["published"]) / statistics.median(seconds["glowq"]),
        "excess_residual": excess,
    }
    if args.json:
        print(json.dumps(report, indent=2))
        return
    print(f"E {args.outputs} x {args.d}, rank {args.rank}; {report['processor']}, {report['threads']} threads")
    print(f"{'solver':<12}{'median s':>10}{'best s':>10}{'residual over the optimum':>28}")
    for name in solvers:
        row = seconds[name]
        print(f"{name:<12}{statistics.median(row):>10.3f}{min(row):>10.3f}{excess[name]:>27.4%}")
    print(f"glowq is {report['speedup']:.1f} times faster (medians).")


if __name__ == "__main__":
    main()
