"""The benchmarks behind README's figures run at small sizes and print the fields that README uses."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.bases import small_model
from support.tiny import library_texts, tiny_llama

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
ROUNDED = ["glowq+int8", "glowq+int4", "glowq+int3"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that runs a benchmark with --json and returns the printed object."""

    def call(name: str, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--json"])
        monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        return json.loads(capsys.readouterr().out)

    return call


def test_the_solver_against_the_published_recipe(run: Any) -> None:
    sizes = ["--d", "64", "--outputs", "96", "--rank", "4", "--tokens", "256", "--repeats", "1"]
    found = run("solver.py", *sizes)
    assert set(found["seconds"]) == {"published", "glowq"}
    assert -1e-6 < found["excess_residual"]["glowq"] < 1e-3
    assert found["excess_residual"]["glowq"] < found["excess_residual"]["published"]


def test_what_it_takes_to_start(run: Any) -> None:
    # One of the two that import transformers, which takes five seconds.
    names = ["python", "import glowq", "import transformers.quantizers.auto", "glowq --version", "glowq --help"]
    rows = run("startup.py", "--repeats", "1", "--starts", *names)["rows"]
    starts = [row["start"] for row in rows]
    assert starts == list(dict.fromkeys(starts)) == names
    assert {"import glowq", "import transformers.quantizers.auto", "glowq --help", "glowq --version"} <= set(starts)
    assert all(row["cpu_seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_the_cost_of_a_correction(run: Any) -> None:
    sizes = ["--calibration-tokens", "1024", "--rank", "2", "--repeats", "1", "--distill", "1"]
    found = run("cost.py", "--model", str(small_model()), "--base", "torchao-int4", *sizes)
    assert (found["base"], found["tokens"], found["distill"]) == ("torchao-int4", 1024, 1)
    assert found["ratio"] == pytest.approx(found["correction_seconds"] / found["forward_seconds"])


@pytest.mark.slow
def test_every_base_at_equal_bytes(run: Any) -> None:
    # These bytes hold rank-4 factors for every group of two blocks.
    sizes = ["--budgets", "65536", "--calibration-tokens", "2048", "--tokens", "2048"]
    rows = run("backends.py", "--model", str(small_model()), "--bases", "torchao-int2", *sizes)["rows"]
    assert [(row["base"], row["method"], row["rank"]) for row in rows] == [
        ("torchao-int2", "glowq-published", 4),
        ("torchao-int2", "glowq", None),
    ]
    for row in rows:
        gap = row["quantized"] - row["reference"]
        assert row["recovered"] == pytest.approx((row["quantized"] - row["corrected"]) / gap)


@pytest.mark.slow
def test_every_form(run: Any, tmp_path: Path) -> None:
    sizes = ["--rank", "2", "--calibration-tokens", "1024", "--repeats", "1"]
    model = tiny_llama(tmp_path / "llama", num_hidden_layers=1)
    rows = run("forms.py", "--model", str(model), *sizes)["rows"]
    size = {row["form"]: row["bytes"] for row in rows}
    assert list(size) == ["full precision", "quantized", "correction", "full", "peft", "merged", "onnx"]
    assert size["correction"] < size["peft"] < size["quantized"] < size["full"] < size["merged"]
    assert all(row["load_seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_onnx_runtime_with_shared_and_with_per_module_factors(run: Any) -> None:
    sizes = ["--hidden", "256", "--intermediate", "128", "--blocks", "1", "--rank", "4"]
    rows = run("onnx_runtime.py", *sizes, "--decodes", "2", "--prefills", "1", "--prompt", "8")["rows"]
    nodes = [(row["groups"], row["right_factor"], row["right_factor_nodes"]) for row in rows]
    assert nodes == [
        ("", "base", 0),
        *(("q, k, v", "shared", 1), ("q, k, v", "per module", 3)),
        *(("every group", "shared", 4), ("every group", "per module", 7)),
    ]


@pytest.mark.parametrize("options", [[], ["--exact", "--dtype", "float32"]], ids=["fast", "exact"])
def test_what_a_correction_adds_to_a_forward(run: Any, options: list[str]) -> None:
    sizes = ["--base", "nf4", "--hidden", "256", "--intermediate", "128", "--blocks", "1", "--rank", "4"]
    rows = run("runtime.py", *sizes, "--new-tokens", "2", "--repeats", "1", "--prompt", "8", *options)["rows"]
    assert [(row["groups"], row["model"]) for row in rows] == [
        (groups, model) for groups in ("q, k, v", "every group") for model in ("base", "shared", "per module")
    ]
    _, shared, single = rows[:3]
    assert single["factor_bytes"] / shared["factor_bytes"] == (3 * 256 + 384) / (256 + 384)
    assert all(row["decode"][1] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.usefixtures("half_products")
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_real_model_beside_its_adapter(run: Any, tmp_path: Path, mode: str) -> None:
    pytest.importorskip("peft")
    model = tiny_llama(tmp_path / "llama", num_hidden_layers=1)
    sizes = ["--prompt", "8", "--new-tokens", "2", "--repeats", "1", "--rank", "4"]
    found = run("runtime_real.py", "--model", str(model), "--bases", "nf4", "--modes", mode, *sizes)
    (part,) = found["parts"]
    assert (part["base"], part["mode"]) == ("nf4", mode)
    base, shared, single, adapter = part["rows"]
    assert [row["model"] for row in part["rows"]] == ["base", "shared", "per module", "PEFT"]
    assert base["factor_bytes"] == 0 < shared["factor_bytes"] < single["factor_bytes"] == adapter["factor_bytes"]
    assert (base["difference"], shared["difference"]) == (1, 0)
    assert max(single["difference"], adapter["difference"]) < 0.1
    assert all(row[kind][1] > 0 for row in part["rows"] for kind in ("first_token", "decode"))


def test_a_real_model_that_is_absent_is_skipped_with_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["runtime_real.py", "--model", str(tmp_path / "none")])
    runpy.run_path(str(BENCHMARKS / "runtime_real.py"), run_name="__main__")
    assert capsys.readouterr().err == (
        f"skipped: there is no model in {tmp_path / 'none'}; `make models` fetches SmolLM2-135M\n"
    )


def test_a_known_model_is_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    tiny_llama(tmp_path / "models" / "tiny")
    library_texts(tmp_path)
    text = ["--calibration", tmp_path / "train.txt", "--data", tmp_path / "test.txt"]
    size = ["--calibration-tokens", 2048, "--tokens", 1024, "--distill", 1]
    place = ["--folder", tmp_path / "models", "--results", tmp_path / "results", "--unfinished", tmp_path / "real"]
    making = ["--making", "svd", "glowq"]
    asked = ["real.py", "--models", "tiny", "absent", "--bases", "torchao-int3", *text, *size, *place, *making]
    monkeypatch.setattr(sys, "argv", [str(word) for word in asked])
    printed = []
    for _ in range(2):
        runpy.run_path(str(BENCHMARKS / "real.py"), run_name="__main__")
        printed.append(capfd.readouterr())
    first, second = printed
    stored = json.loads((tmp_path / "results" / "tiny-torchao-int3.json").read_text())
    assert (tmp_path / "results" / "tiny-torchao-int3.png").is_file()
    methods = {row["method"] for row in stored["rows"]}
    assert {
        "svd",
        "eora",
        "glowq-published",
        "glowq",
        *ROUNDED,
        f"{ROUNDED[-1]}+distilled",
        "finer",
        "wider",
    } <= methods
    assert list(stored["making"]) == ["svd", "glowq"]
    assert all(made["seconds"] > 0 for made in stored["making"].values())
    assert not [*(tmp_path / "real").iterdir()]
    assert {"machine", "versions", "command", "comparing"} <= set(stored)
    texts = [item["command"] for item in (stored, *stored["making"].values())]
    texts += [stored[text]["source"] for text in ("data", "calibration")]
    assert not any(
        str(tmp_path) in text for text in texts
    )  # a published file does not tell where its maker keeps files
    assert "glowq compare" in first.err
    assert "glowq compare" not in second.err  # it is there already
    assert "absent is not there: left out" in first.err
    assert second.out == first.out
    assert "perplexity, KL divergence undone" in first.out


@pytest.mark.slow
def test_eora_as_gptqmodel_makes_it_beside_ours(tmp_path: Path) -> None:
    """In a process of its own: gptqmodel writes to the stdout that it found when it was imported."""
    pytest.importorskip("gptqmodel")
    model = tiny_llama(tmp_path / "llama", num_hidden_layers=1)
    library_texts(tmp_path)
    text = ["--calibration", tmp_path / "train.txt", "--data", tmp_path / "test.txt"]
    size = ["--calibration-tokens", "8192", "--tokens", "1024", "--ranks", "8", "--bits", "4", "--group-size", "32"]
    command = [sys.executable, BENCHMARKS / "gptqmodel_eora.py", "--model", model, *text, *size, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    rows = {row["method"]: row for row in found["rows"]}
    assert {"eora of GPTQModel", "eora", "glowq", "glowq-published", *ROUNDED} == set(rows)
    theirs, ours = rows["eora of GPTQModel"], rows["eora"]
    assert (theirs["rank"], theirs["factor_bytes"]) == (ours["rank"], ours["factor_bytes"])
    quantized = found["models"][1]["kl"]
    assert ours["kl"] < quantized
    assert ours["kl"] == pytest.approx(theirs["kl"], abs=0.1 * quantized)
    assert found["adapter_seconds"]["8"] > 0
