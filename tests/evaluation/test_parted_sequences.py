"""Text that is too short for calibration and evaluation is refused; the error states how many tokens are needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from glowq.errors import CalibrationError
from glowq.evaluation.held_out import parted_sequences
from support.cli import call
from support.tiny import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def part(model: Path, tokenizer: Any, tmp_path: Path) -> Any:
    """A function that divides a text of about `words` tokens and returns the numbers of sequences in both parts."""

    def apply(words: int, tokens: int = 32768, length: int = 64) -> tuple[int, int]:
        (tmp_path / "notes.txt").write_text("x\n" * words)
        config, notes = AutoConfig.from_pretrained(model), str(tmp_path / "notes.txt")
        train, held = parted_sequences(config, tokenizer, notes, tokens, length, 0)
        return len(train), len(held)

    return apply


@pytest.mark.parametrize("words", [1, 20, 40])
def test_a_tiny_file(part: Any, tokenizer: Any, words: int) -> None:
    found = len(tokenizer("x\n" * words, add_special_tokens=False)["input_ids"]) + 1  # plus the end-of-text token
    assert found < 128
    with pytest.raises(
        CalibrationError, match=rf"needed 128 tokens for 2 sequences, found {found} in 1 documents; give"
    ):
        part(words)


def test_just_enough(part: Any) -> None:
    assert part(128) >= (1, 1)
    assert part(2000, tokens=128) == (1, 1)


@pytest.mark.parametrize("tokens", [63, 64, 127])
def test_a_limit_that_is_too_low(part: Any, tokens: int) -> None:
    message = rf"needed 128 tokens for at least 2 sequences of 64 tokens, found a limit of {tokens} tokens; raise it"
    with pytest.raises(CalibrationError, match=message):
        part(2000, tokens=tokens)


def test_at_the_command_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("import os\n")
    command = ["correct", model, "--base", "nf4", "--calibration", tmp_path / "notes.txt"]
    done = call(*command, "--output", tmp_path / "out", "--json")
    assert done.exit_code == 1
    assert re.fullmatch(
        r"glowq: error: needed 1024 tokens for 2 sequences, found \d+ in 1 documents; .*\n", done.stderr
    )
    assert not (tmp_path / "out").exists()
