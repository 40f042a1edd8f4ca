"""The doors of glowq themselves, on folders with changed files: refused by name, or the very same answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

import glowq
from glowq.errors import GlowQError
from glowq.models.loading import load_config, load_model, model_class
from glowq.runtime.attach import attached, attached_factors
from support.cli import call
from support.forms import Saved, answers, applied
from support.fuzzing import Part, parts, refusal
from support.mutations import ByteChanges, byte_changes, header_changes, json_changes
from support.tiny import EXAMPLE, load, quantized


def changes(saved: Saved) -> st.SearchStrategy[tuple[str, Any]]:
    """Changes of the fields that glowq stored, of the factors' header, or of the bytes of a file."""
    start = 8 + int.from_bytes(saved.content[:8], "little")
    found = {
        "fields": json_changes(),
        "config": byte_changes(len(saved.config), 1),
        "header": header_changes(),
        "content": byte_changes(start),
    }
    return st.one_of([st.tuples(st.just(name), strategy) for name, strategy in found.items()])


def write(saved: Saved, folder: Path, name: str, change: Any) -> Path:
    if name == "fields":
        config = json.loads(saved.config)
        changed = {**config, "quantization_config": change(config["quantization_config"])}
        return saved.copy(folder, json.dumps(changed).encode())
    if name == "config":
        return saved.copy(folder, change(saved.config))
    return saved.copy(folder, content=change(saved.content))


def command(*arguments: object) -> None:
    """Run a command, and raise the error that it printed."""
    done = call(*arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    if done.exit_code:
        assert done.exit_code == 1
        error = [line for line in done.stderr.splitlines() if line.startswith("glowq: error: ")]
        assert len(error) == 1, done.stderr
        raise GlowQError(error[0])


@parts(600, few=5)
def test_inspect(saved: Saved, part: Part, copy: Path) -> None:
    part.run(changes(saved), lambda drawn: refusal(lambda: command("inspect", write(saved, copy, *drawn))))


@parts(4_000)
def test_load_config(saved: Saved, part: Part, copy: Path) -> None:
    """What every command does before it loads a model."""
    config = json.loads(saved.config)

    def case(change: Any) -> None:
        saved.copy(copy, json.dumps(change(config)).encode())
        refusal(lambda: model_class(load_config(str(copy))))

    part.run(json_changes(), case)


@parts(4_000)
def test_load_correction(forms: dict[str, Saved], part: Part, copy: Path) -> None:
    saved = forms["correction"]
    model = quantized(saved.folder.parent / "base", "nf4")

    def door() -> None:
        correction = glowq.load_correction(model, copy)
        assert applied(correction.factors) == saved.factors

    def case(drawn: Any) -> None:
        write(saved, copy, *drawn)
        if refusal(door) is None:
            assert torch.equal(answers(model), saved.logits)
            glowq.detach(model)

    part.run(changes(saved), case)


@parts(2_000, few=5)
def test_from_pretrained(saved: Saved, part: Part, copy: Path) -> None:
    """The plain loader of transformers, which parses config.json itself before glowq is asked.

    The same factors are in the model, or it is refused. The answers are the same, too, if only the factors' file was
    changed: config.json has settings of the model and of its base that change them.
    """
    whole = saved.weights == "model.safetensors"

    def case(drawn: Any) -> None:
        write(saved, copy, *drawn)
        # Two fields that transformers itself reads before it asks glowq, and has no errors of its own for.
        if drawn[0] == "fields":
            config = json.loads((copy / "config.json").read_text())
            config["quantization_config"]["quant_method"] = "glowq"
            (copy / "config.json").write_text(json.dumps(config))
        if drawn[0] == "config" and b'"dtype": "bfloat16"' not in (copy / "config.json").read_bytes():
            return

        def door() -> None:
            model = load(copy)
            if attached(model):
                assert applied(attached_factors(model)) == saved.factors
            if drawn[0] in ("header", "content") and not whole:
                assert torch.equal(answers(model), saved.logits)

        # transformers itself reads the other weights of a model in one piece, and has no errors of its own for them.
        refusal(door, OSError, ValueError, *([RuntimeError] if whole else []))

    part.run(changes(saved), case)


@parts(300, few=3)
def test_verify(saved: Saved, part: Part, copy: Path) -> None:
    part.run(changes(saved), lambda drawn: refusal(lambda: command("verify", write(saved, copy, *drawn))))


@parts(600, few=5)
def test_a_header_without_a_tensor(forms: dict[str, Saved], part: Part, copy: Path) -> None:
    """A model in one piece whose header was changed answers as before, or is refused."""
    saved = forms["full"]

    def door() -> None:
        model = load_model(str(copy), load_config(str(copy)))
        assert torch.equal(answers(model), saved.logits)

    part.run(header_changes(), lambda change: refusal(lambda: (write(saved, copy, "header", change), door())))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", "generation_config.json"])
@parts(600, few=5)
def test_files_beside_the_factors(forms: dict[str, Saved], part: Part, copy: Path, name: str) -> None:
    saved = forms["correction"]
    saved.copy(copy)
    for file in ("tokenizer_config.json", "tokenizer.json"):
        shutil.copy(EXAMPLE / file, copy)
    shutil.copy(saved.folder / "generation_config.json", copy)
    content = (copy / name).read_bytes()
    stored = json.loads(content)

    def case(change: Any) -> None:
        found = change(content if isinstance(change, ByteChanges) else stored)
        (copy / name).write_bytes(found if isinstance(found, bytes) else json.dumps(found).encode())
        refusal(lambda: glowq.Correction.from_pretrained(copy))

    part.run(st.one_of(json_changes(), byte_changes(200)), case)
