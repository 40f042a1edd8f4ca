"""README and the guides: links lead somewhere, commands exist, and the code of README runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoTokenizer

from glowq.cli.app import app
from support.cli import call
from support.tiny import TEXTS, quantized, tiny_llama

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "examples" / "guides").glob("*.md"))]
COMMANDS: Any = typer.main.get_command(app)


def blocks(page: Path, language: str = "") -> list[str]:
    """The code blocks of a page in one language; "" are those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [code for name, code in found if name == language]


def commands(page: Path) -> list[list[str]]:
    """The command lines of glowq in the blocks without a language."""
    lines = [line for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("glowq ")]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_compiles_and_options_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")
    for words in commands(page):
        known = {name for parameter in COMMANDS.commands[words[0]].params for name in parameter.opts}
        if words[0] != "run":
            assert {word for word in words if word.startswith("--")} <= known, words


def test_every_command_is_in_the_guide() -> None:
    (guide,) = (page for page in PAGES if page.name == "commands.md")
    assert {words[0] for words in commands(guide)} == set(COMMANDS.commands)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, which holds what README names: a model, the same quantized, and text."""
    source = tiny_llama(tmp_path / "org" / "model", num_hidden_layers=1)
    for part in (quantized(source, "nf4"), AutoTokenizer.from_pretrained(source)):
        part.save_pretrained(tmp_path / "org" / "model-GPTQ")
    (tmp_path / "notes.txt").write_text("\n".join(TEXTS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_commands_of_readme_run(place: Path) -> None:
    """All but the server and the upload. The corrections of so small a model are kept by force."""
    for words in commands(PAGES[0]):
        if words[0] != "push":
            done = call(*words, *(["--force"] if words[0] == "correct" else []))
            assert done.exit_code == 0, (words, done.stderr)


@pytest.mark.slow
def test_the_python_of_readme_runs(place: Path) -> None:
    first, second = blocks(PAGES[0], "python")
    exec(first, {})
    assert {"corr-gptq", "full"} <= {path.name for path in place.iterdir()}
    (place / "corr-gptq").rename(place / "corr")
    exec(second, {})
