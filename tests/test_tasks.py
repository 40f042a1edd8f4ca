"""`glowq compare --tasks`: every model is run, and names that the harness does not know are refused at once."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_cli import call, result_of
from tiny import library_texts, tiny_llama

from glowq.runtime import attached

SIZES = ["--calibration-tokens", "1024", "--tokens", "1024", "--sequence-length", "64"]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("tasks")
    library_texts(folder)
    texts = ["--calibration", folder / "train.txt", "--data", folder / "test.txt"]
    return ["compare", tiny_llama(folder / "model"), "--base", "nf4", *texts, *SIZES, "--budgets", "6%"]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for lm-evaluation-harness that remembers its calls, and counts the groups that it was given."""
    calls: list[dict[str, Any]] = []

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        if "arc_offline" in options["tasks"]:
            raise OSError("its data cannot be had")
        calls.append(options)
        score = len(attached(options["model"].model)) / 100
        return {"results": {"arc": {"alias": "arc", "acc,none": score, "acc_stderr,none": 0.01, "sample_len": 9}}}

    class HFLM:
        def __init__(self, pretrained: Any, tokenizer: Any) -> None:
            self.model = pretrained

    class TaskManager:
        all_tasks = ("arc", "arc_offline", "hellaswag")

    harness, tasks, models, huggingface = (
        ModuleType(f"lm_eval{rest}") for rest in ("", ".tasks", ".models", ".models.huggingface")
    )
    harness.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    tasks.TaskManager = TaskManager  # type: ignore[attr-defined]
    huggingface.HFLM = HFLM  # type: ignore[attr-defined]
    for module in (harness, tasks, models, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("glowq.cli.tasks.find_spec", lambda name: harness if name == "lm_eval" else find_spec(name))
    return calls


def test_every_model_is_run(command: list[Any], harness: list[dict[str, Any]]) -> None:
    result = result_of(*command, "--methods", "svd,qera,eora", "--tasks", "arc", "--seed", "3")
    scores = {model: found["arc"]["acc"]["value"] for model, found in result["tasks"].items()}
    assert all(set(found["arc"]) == {"acc"} for found in result["tasks"].values())
    assert scores == {"reference": 0, "quantized": 0, "svd at 6%": 0.08, "qera at 6%": 0.14, "eora at 6%": 0.14}
    assert result["tasks"]["svd at 6%"]["arc"]["acc"]["ci95"] == pytest.approx([0.0604, 0.0996])
    assert len(harness) == 4  # eora is qera
    assert {options["fewshot_random_seed"] for options in harness} == {3}


@pytest.mark.parametrize(("name", "near"), [("hella_swag", " Did you mean 'hellaswag'?"), ("no_such_task", "")])
def test_an_unknown_task_is_refused_before_anything_is_loaded(
    command: list[Any], harness: list[dict[str, Any]], name: str, near: str
) -> None:
    absent = [part if part != command[1] else "no/such-model" for part in command]
    done = call(*absent, "--tasks", f"arc,{name}")
    assert done.exit_code == 1
    expected = f"lm-evaluation-harness knows no task '{name}'; `lm-eval ls tasks` lists them all.{near}\n"
    assert done.stderr.endswith(expected)
    assert not harness


def test_a_task_of_ones_own_is_a_file(command: list[Any], harness: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("task: own\n")
    result_of(*command, "--methods", "svd", "--tasks", tmp_path / "own.yaml")
    assert harness[0]["tasks"] == [str(tmp_path / "own.yaml")]


def test_a_task_that_cannot_be_run(command: list[Any], harness: list[dict[str, Any]]) -> None:
    done = call(*command, "--methods", "svd", "--tasks", "arc_offline")
    assert done.exit_code == 1
    assert "lm-evaluation-harness cannot run arc_offline: its data cannot be had" in done.stderr
