"""The base of a saved correction was damaged or replaced: loading says so in one error, and changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from glowq.errors import CorrectionError, FingerprintError, GlowQError
from support.corrections import changed
from support.tiny import load, tiny_llama


@pytest.fixture
def moved(source: Path, rank_8: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A base folder that a test may change, and a correction that names it."""
    base = Path(shutil.copytree(source, tmp_path / "base"))
    return base, changed(rank_8, tmp_path / "correction", lambda c: c["base_model"].update(name=str(base)))


@pytest.mark.parametrize("kept", [0, 7, 100, -100])
def test_truncated(moved: tuple[Path, Path], kept: int) -> None:
    base, correction = moved
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:kept])
    with pytest.raises(CorrectionError, match=r"base/model\.safetensors is corrupt or truncated"):
        load(correction)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "hidden_size is 64 in its config.json, and 128"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1"),
        ({"vocab_size": 4097}, "vocab_size is 4097"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4"),
        ({"seed": 7}, "the correction was made for quantized weights"),
    ],
)
def test_another_model(moved: tuple[Path, Path], changes: dict[str, Any], message: str) -> None:
    base, correction = moved
    shutil.rmtree(base)
    tiny_llama(base, **changes)
    with pytest.raises(FingerprintError, match=message):
        load(correction)


def test_another_kind_of_model(moved: tuple[Path, Path]) -> None:
    base, correction = moved
    text = (base / "config.json").read_text()
    (base / "config.json").write_text(text.replace('"llama"', '"mistral"'))
    with pytest.raises(FingerprintError, match="model_type is 'mistral'"):
        load(correction)


def test_shards_of_another_model(moved: tuple[Path, Path]) -> None:
    """Its config.json fits, and its weights do not."""
    base, correction = moved
    config = (base / "config.json").read_text()
    shutil.rmtree(base)
    tiny_llama(base, intermediate_size=192)
    (base / "config.json").write_text(config)
    with pytest.raises(GlowQError):
        load(correction)
