"""Changed calibration files: each is refused by an error of glowq, or gives the text that it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from glowq.data.text import read_texts
from glowq.data.tokens import token_sequences
from support.fuzzing import Part, parts, refusal
from support.mutations import byte_changes, json_changes

RECORDS = [{"text": "def area(width, height):", "id": 1}, {"text": "é \u2028 \U0001f600"}, {"text": "import os\n" * 9}]
LINES = "\n".join(map(json.dumps, RECORDS))


def check(file: Path, content: bytes, tokenizer: Any) -> None:
    file.write_bytes(content)

    def door() -> None:
        texts = read_texts(file)
        text = content.decode().replace("\r\n", "\n").replace("\r", "\n")  # as Python reads a text file
        held = (
            [text] if file.suffix == ".txt" else [json.loads(line)["text"] for line in text.split("\n") if line.strip()]
        )
        assert texts == [text for text in held if text.strip()]
        ids: Tensor = token_sequences(texts, tokenizer, length=4, limit=64, vocab_size=4096)
        assert ids.shape[1] == 4
        assert 0 <= int(ids.min()) <= int(ids.max()) < 4096

    refusal(door)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
@parts(4_000)
def test_bytes(part: Part, suffix: str, tmp_path: Path, tokenizer: Any) -> None:
    content = LINES.encode() if suffix == "jsonl" else "".join(record["text"] for record in RECORDS).encode()
    file = tmp_path / f"text.{suffix}"
    part.run(byte_changes(len(content)), lambda change: check(file, change(content), tokenizer))


@parts(6_000)
def test_records(part: Part, tmp_path: Path, tokenizer: Any) -> None:
    def case(change: Any) -> None:
        changed = change(RECORDS)
        lines = map(json.dumps, changed if isinstance(changed, list) else [changed])
        check(tmp_path / "text.jsonl", "\n".join(lines).encode(), tokenizer)

    part.run(json_changes(), case)
