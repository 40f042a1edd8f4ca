"""Tasks of lm-evaluation-harness: a comparison runs every model on them, and `glowq run` loads a saved correction."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import glowq
from support.cli import call, fresh, result_of
from support.tiny import TEXTS, corrected, load

SIZES = ["--calibration-tokens", "1024", "--tokens", "1024", "--sequence-length", "64"]
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A custom task: the perplexity of two texts."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text[:300]}) + "\n" for text in TEXTS[:2]))
    (folder / "own.yaml").write_text(TASK.format(name="own", data=folder / "texts.jsonl"))
    return folder / "own.yaml"


@pytest.fixture(scope="module")
def command(compared_folder: Path) -> list[Any]:
    texts = ["--calibration", compared_folder / "train.txt", "--data", compared_folder / "test.txt"]
    return ["compare", compared_folder / "model", "--base", "nf4", *texts, *SIZES, "--budgets", "6%"]


def byte_perplexity(folder: Path, model: Any) -> float:
    """Compute the measure of the task with the model's forward. An end-of-text token precedes every text."""
    tokenizer, total, size = AutoTokenizer.from_pretrained(folder), 0.0, 0
    for text in (text[:300] for text in TEXTS[:2]):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, :-1].float()
        total += float(logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum())
        size += len(text.encode())
    return math.exp(-total / size)


def test_every_model_is_run(command: list[Any], task: Path, compared_folder: Path) -> None:
    result = result_of(*command, "--methods", "svd,qera,eora", "--tasks", task, "--seed", "3")
    found = {model: tasks["own"]["byte_perplexity"]["value"] for model, tasks in result["tasks"].items()}
    assert list(found) == ["reference", "quantized", "svd at 6%", "qera at 6%", "eora at 6%"]
    expected = byte_perplexity(compared_folder / "model", load(compared_folder / "model"))
    assert found["reference"] == pytest.approx(expected, rel=1e-3)  # rounding depends on the batches
    assert found["eora at 6%"] == found["qera at 6%"]  # both methods solve the same
    assert len({found[name] for name in ("reference", "quantized", "svd at 6%", "qera at 6%")}) == 4


@pytest.mark.parametrize(("name", "near"), [("hella_swag", " Did you mean 'hellaswag'?"), ("no_such_thing_at_all", "")])
def test_an_unknown_task_is_refused_before_anything_is_loaded(command: list[Any], name: str, near: str) -> None:
    absent = [part if part != command[1] else "no/such-model" for part in command]
    done = call(*absent, "--tasks", f"hellaswag,{name}")
    assert done.exit_code == 1
    expected = f"lm-evaluation-harness has no task '{name}'; `lm-eval ls tasks` lists them all.{near}\n"
    assert done.stderr.endswith(expected)


def test_a_task_that_cannot_be_run(command: list[Any], tmp_path: Path) -> None:
    (tmp_path / "lost.yaml").write_text(TASK.format(name="lost", data=tmp_path / "none.jsonl"))
    done = call(*command, "--methods", "svd", "--tasks", tmp_path / "lost.yaml")
    assert done.exit_code == 1
    assert f"lm-evaluation-harness cannot run {tmp_path / 'lost.yaml'}: " in done.stderr
    assert "none.jsonl" in done.stderr


def test_the_harness_loads_a_saved_correction(source: Path, task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "correction"
    corrected(source, "fp4", rank=64)[1].save_pretrained(folder)
    arguments = [
        "--model",
        "hf",
        "--model_args",
        f"pretrained={folder},dtype=float32",
        "--tasks",
        task,
        "--device",
        "cpu",
    ]
    done = fresh(tmp_path, "run", "-m", "lm_eval", *arguments, "--output_path", tmp_path / "results.json")
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.rglob("results*.json")
    found = json.loads(written.read_text())["results"]["own"]["byte_perplexity,none"]
    model = load(folder, dtype=torch.float32)
    assert found == pytest.approx(byte_perplexity(folder, model), rel=1e-5)
    with glowq.disabled(model):
        assert abs(found / byte_perplexity(folder, model) - 1) > 1e-4  # ten times the tolerance above
