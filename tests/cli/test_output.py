"""What the commands print: names as they are, nothing that a terminal obeys, and one line after Ctrl-C."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from glowq.cli.output import command_line, grid, note, session, visible
from support.cli import call, result_of
from support.fresh_process import run_python

GOLDEN = Path(__file__).parents[1] / "artifact" / "golden" / "format-1.0-bfloat16"
ESCAPES = "\x1b]0;mine\x07\x1b[31mred\x9b2J\u202ereversed\r\x08"


def a_correction(folder: Path, **provenance: Any) -> Path:
    shutil.copytree(GOLDEN, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["provenance"].update(provenance)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["mod[/v1]", "out[v2]", "[bold]x[/bold]", "a[/]", ":smile:", "[link=x]y", "a\\[b]"])
def test_names_are_no_markup(tmp_path: Path, name: str) -> None:
    folder = a_correction(tmp_path / "f" / name, command=name)
    done = call("inspect", folder)
    assert done.exit_code == 0, done.stderr
    shown = "".join(line.partition("model  ")[2].strip() or line for line in done.stdout.splitlines())
    assert name in shown
    assert done.stdout.count(name) >= 1
    assert result_of("inspect", folder)["model"] == str(folder)


def test_a_missing_folder_is_named_as_it_is(tmp_path: Path) -> None:
    done = call("inspect", tmp_path / "mod[" / "v1]")
    assert done.exit_code == 1
    assert "mod[/v1]" in done.stderr


def test_a_provenance_reaches_no_terminal(tmp_path: Path) -> None:
    folder = a_correction(tmp_path / "stranger", command=f"glowq {ESCAPES}", glowq=ESCAPES)
    done = call("inspect", folder)
    assert done.exit_code == 0, done.stderr
    assert not set("\x1b\x07\x9b\u202e\r\x08") & set(done.stdout + done.stderr)
    assert r"\x1b[31mred\x9b2J\u202ereversed" in done.stdout
    assert result_of("inspect", folder)["provenance"]["glowq"] == ESCAPES


def test_an_error_reaches_no_terminal(tmp_path: Path) -> None:
    folder = a_correction(tmp_path / "stranger")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][f"x{ESCAPES}"] = 1
    config["architectures"] = [ESCAPES]
    (folder / "config.json").write_text(json.dumps(config))
    for command in ("inspect", "verify", "groups"):
        done = call(command, folder)
        assert done.exit_code == 1
        assert not set("\x1b\x07\x9b\u202e\r\x08") & set(done.stdout + done.stderr)
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("näher, 中文, 😀", "näher, 中文, 😀"),
        ("a\nb\tc", "a\nb\tc"),
        ("\x1b[0m", r"\x1b[0m"),
        ("\x00\x7f\x85", r"\x00\x7f\x85"),
        ("\u2028\u2066\ufeff", r"\u2028\u2066\ufeff"),
        ("\ud800", r"\ud800"),
    ],
)
def test_visible(text: str, expected: str) -> None:
    assert visible(text) == expected


def test_a_stored_command_names_no_folder_outside_of_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["glowq", "correct", "/home/me/models/tiny", "--base", "nf4", "--calibration=/data/notes.txt", "--resume"]
    typed += ["--reference", "../secret/full", "--output", "/home/me/out", "--budget", "recover 80%"]
    monkeypatch.setattr(sys, "argv", [*typed, "org/model", "data/own.txt", "~/x/y.txt"])
    stored = "glowq correct tiny --base nf4 --calibration=notes.txt --resume --reference full --output OUT --budget"
    assert command_line("/home/me/out") == f"{stored} 'recover 80%' org/model data/own.txt y.txt"
    assert "/home/me/models/tiny" in command_line()


def test_of_several_texts_each_is_stored_without_its_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["glowq", "correct", "--calibration=/data/a.txt,b.txt,../c.txt", "--output", "o"])
    assert command_line("o") == "glowq correct --calibration=a.txt,b.txt,c.txt --output OUT"


def test_notes_and_tables_pass_the_same_function(capsys: pytest.CaptureFixture[str]) -> None:
    note(f"of [v1] {ESCAPES}")
    with session(False) as show:
        show({}, lambda: grid({"[name]": f"[value] {ESCAPES}"}))
    found = capsys.readouterr()
    for text in found:
        assert not set("\x1b\x07\x9b\u202e\x08") & set(text)
    assert found.err.startswith("glowq: note: of [v1] ")
    assert "[name]  [value] " in found.out


# A signal comes while a module is imported: the interpreter handles it there, as at any other place.
INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from glowq.cli.entry import main

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.modules.pop({module!r}, None)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["glowq", *{arguments!r}]
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself Ctrl-C on Windows")
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("typer", ["inspect", str(GOLDEN)]),
        ("glowq.cli.app", ["--help"]),
        ("glowq.cli.commands.verify", ["--version"]),
        ("glowq.models.headers", ["inspect", str(GOLDEN)]),
        ("rich.console", ["inspect", str(GOLDEN)]),
        ("this", ["run", "-m", "this"]),
    ],
)
def test_ctrl_c(module: str, arguments: list[str]) -> None:
    done = run_python("-c", INTERRUPTED.format(module=module, arguments=arguments))
    assert (done.returncode, done.stderr.strip()) == (130, "glowq: interrupted")
    assert done.stdout == ""
