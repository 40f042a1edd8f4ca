"""The benchmark runs in the interpreter, and fails with a message if the kernels cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "benchmark.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def test_smoke_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    result = run("--interpret", "--tokens", "1", "3", "--rank", "4", "--json", str(tmp_path / "times.json"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("interpreter: times mean nothing;")
    report = json.loads((tmp_path / "times.json").read_text())
    assert report["rank"] == 4
    base, shared, small, apart, member = (
        next(row for row in report["rows"] if row["group"] == "q, k, v" and row["name"] == name)
        for name in ("base", "base + shared", "base + shared, int8", "base + shared, apart", "base + per member")
    )
    assert (base["bytes_ratio"], base["time_ratio"]) == (0, 0)
    # The factors (rank 4, bfloat16, 256 inputs, 128 outputs), relative to 16 KiB of codes and two groups of scales and
    # zero points.
    stored = 128 * 256 // 2 + 2 * 128 * 2 + 2 * 128 // 2
    assert shared["bytes_ratio"] == apart["bytes_ratio"] == 2 * 4 * (256 + 128) / stored
    assert small["bytes_ratio"] == (4 * (256 + 128) + 4 * (4 + 128)) / stored
    assert member["bytes_ratio"] == 2 * 4 * (3 * 256 + 128) / stored
    assert {row["layout"] for row in report["rows"]} == {"gptq", "nf4"}
    assert {row["tokens"] for row in report["rows"]} == {1, 3}
    assert all(row["quartiles"][0] <= row["median"] <= row["quartiles"][1] for row in report["rows"])


@pytest.mark.skipif(torch.cuda.is_available() or torch.xpu.is_available(), reason="there is a GPU to time")
def test_without_a_gpu_it_says_so_and_fails() -> None:
    result = run()
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Nothing to time: ")
    assert "--interpret" in result.stderr
