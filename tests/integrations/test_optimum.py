"""The exporter step for optimum writes the same files as `glowq correct`, and optimum-cli starts without glowq."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from optimum.commands import optimum_cli
from optimum.exporters.glowq import GlowQExporterConfig, main_export
from optimum.exporters.tasks import TasksManager
from transformers import AutoModel, LlamaConfig

import glowq
from glowq.errors import ConfigError
from support.cli import result_of
from support.tiny import CALIBRATION, IDS, TEXTS, load, logits

SIZES = ["--calibration-tokens", "1024", "--sequence-length", "128", "--rank", "4"]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("\n".join(TEXTS))
    return path


@pytest.fixture
def optimum(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """A function that runs optimum-cli in this process and returns (exit status, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["/somewhere/optimum-cli", *map(str, arguments)])
        # The commands of optimum-quanto cannot be loaded with this version of optimum, and print an error.
        monkeypatch.setattr(optimum_cli, "load_subpackages", lambda: None)
        capfd.readouterr()
        status: Any = 0
        try:
            optimum_cli.main()
        except SystemExit as ending:
            status = ending.code
        found = capfd.readouterr()
        return int(status or 0), found.out, found.err

    return call


def test_the_step_writes_what_correct_writes(optimum: Any, source: Path, notes: Path, tmp_path: Path) -> None:
    options = ["--base", "nf4", "--calibration", notes, *SIZES]
    status, out, _ = optimum("export", "glowq", "-m", source, *options, tmp_path / "ours", "--json")
    assert status == 0
    found = json.loads(out)
    expected = result_of("correct", source, *options, "--output", tmp_path / "theirs")
    same = ("groups", "ranks", "factor_bytes", "base_bytes", "predicted", "held_out", "calibration_tokens", "seed")
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    assert found["command"].startswith("optimum-cli export glowq -m ")
    factors = [(tmp_path / name / "glowq.safetensors").read_bytes() for name in ("ours", "theirs")]
    assert factors[0] == factors[1]
    assert torch.equal(logits(load(tmp_path / "ours")), logits(load(tmp_path / "theirs")))
    status, out, _ = optimum("glowq", "inspect", tmp_path / "ours", "--json")
    assert (status, json.loads(out)["kind"]) == (0, "correction")
    status, out, _ = optimum("glowq", "verify", tmp_path / "ours", "--json")
    assert (status, json.loads(out)["groups"]) == (0, found["groups"])


def test_failure_is_one_line_and_status_1(optimum: Any, source: Path, notes: Path, tmp_path: Path) -> None:
    status, out, err = optimum("export", "glowq", "-m", tmp_path / "none", "--calibration", notes, tmp_path / "out")
    assert (status, out) == (1, "")
    assert "glowq: error: no folder" in err
    status, _, err = optimum("glowq", "verify", source)
    assert status == 1
    assert "carries no glowq correction" in err
    assert optimum("export", "glowq", "-m", source, tmp_path / "out")[0] == 2  # --calibration is missing
    asked = ["-m", source, "--base", "nf4", "--calibration", notes, "--distill", "much"]
    status, _, err = optimum("export", "glowq", *asked, tmp_path / "out")
    assert (status, err.strip()) == (1, "glowq: error: --distill takes a number of steps or auto, found 'much'.")


def test_a_task_names_the_class(source: Path, notes: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"base": "nf4", "calibration": str(notes), "rank": 2, **CALIBRATION}
    found = main_export(str(source), tmp_path / "out", task="feature-extraction", **options)
    assert found["held_out"] is None  # a model without logits has no perplexity
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaModel"]
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        corrected = model(input_ids=IDS).last_hidden_state
        with glowq.disabled(model):
            assert not torch.equal(model(input_ids=IDS).last_hidden_state, corrected)
    with pytest.raises(ConfigError, match="a llama model cannot be corrected for the task 'text-to-audio'"):
        main_export(str(source), tmp_path / "never", task="text-to-audio", **options)
    assert not (tmp_path / "never").exists()


def test_the_tasks_manager_knows_the_exporter() -> None:
    build = TasksManager.get_exporter_config_constructor(
        "glowq", model_type="llama", task="text-generation", library_name="transformers"
    )
    config = build(LlamaConfig(vocab_size=64))
    assert isinstance(config, GlowQExporterConfig)
    inputs = config.generate_dummy_inputs(framework="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert int(inputs["input_ids"].max()) < 64


def run(code: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],  # -P: the working directory may hold another glowq
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        check=True,
    )
    return done.stdout


COMMANDS = "from optimum.commands.optimum_cli import load_optimum_namespace_cli_commands as load; print(len(load()))"


def test_optimum_cli_starts_without_glowq() -> None:
    found = run(f"{COMMANDS}; import sys; print([n for n in ('glowq', 'torch', 'transformers') if n in sys.modules])")
    assert found.split("\n")[:2] == ["2", "[]"]


DECLARE = """
import argparse, sys
from optimum.commands.register.register_glowq import GlowQExportCommand
parser = argparse.ArgumentParser()
GlowQExportCommand.parse_args(parser)
"""


def test_the_options_are_declared_without_torch() -> None:
    code = (
        "print([name for name in ('torch', 'transformers') if name in sys.modules], '--rank' in parser.format_help())"
    )
    assert run(DECLARE + code) == "[] True\n"


def test_a_broken_install_leaves_optimum_cli_alone(tmp_path: Path) -> None:
    (tmp_path / "glowq").mkdir()
    (tmp_path / "glowq" / "__init__.py").write_text("raise RuntimeError('broken')")
    assert run(COMMANDS, PYTHONPATH=str(tmp_path)) == "2\n"
    code = "try: parser.parse_known_args(['-m', 'model'])\nexcept RuntimeError as error: print(error)"
    assert run(DECLARE + code, PYTHONPATH=str(tmp_path)) == "broken\n"
