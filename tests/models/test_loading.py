"""Damaged files of a model, and paths that are none: one error of glowq, and one line of every command."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

import glowq
from glowq import Correction
from glowq.errors import (
    ConfigError,
    CorrectionError,
    GlowQError,
    ModelNotFoundError,
    OutputError,
    UnsupportedModuleError,
)
from glowq.models.loading import load_config, load_model, model_class
from glowq.models.preprocessors import load_tokenizer
from glowq.utils.files import checkpoint_files
from support.cli import call
from support.tiny import correct, gap, load, logits


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def one_line(*arguments: Any) -> str:
    done = call(*arguments)
    assert done.exit_code == 1, done.stdout
    assert done.stderr.startswith("glowq: error: ")
    assert done.stderr.count("\n") == 1
    return str(done.stderr)


@pytest.mark.parametrize("kept", [0, 7, 100, -100])
def test_truncated_weights(folder: Path, kept: int) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:kept])
    with pytest.raises(CorrectionError, match="corrupt or truncated"):
        load_model(str(folder), load_config(str(folder)))
    assert "corrupt or truncated" in one_line("groups", folder)
    assert "corrupt or truncated" in one_line("inspect", folder)


TOKENIZERS: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"version": "1.0", "added_tokens": [',
    "a list": b"[]",
    "other fields": b'{"version": "1.0", "model": {"type": "BPE"}}',
    "binary": b"\xff\x00" * 50,
    "wrong types": b'{"version": 1, "added_tokens": 5, "model": 7}',
}


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        *(("tokenizer.json", kind) for kind in TOKENIZERS),
        *(("tokenizer_config.json", kind) for kind in ("empty", "cut", "a list", "binary")),
    ],
)
def test_a_damaged_tokenizer(folder: Path, file: str, kind: str) -> None:
    (folder / file).write_bytes(TOKENIZERS[kind])
    with pytest.raises(GlowQError, match="tokenizer"):
        load_tokenizer(str(folder))


def test_a_model_in_one_piece_that_lacks_a_tensor(rank_8: Path, tmp_path: Path) -> None:
    """transformers fills the tensor with random numbers, and only says so."""
    folder = tmp_path / "full"
    load(rank_8).save_pretrained(folder)
    assert call("verify", folder).exit_code == 0
    with safe_open(folder / "model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        left = {key: value for key, value in tensors.items() if key != name}
        save_file(left, folder / "model.safetensors", metadata=metadata)
        assert f"lack {name!r} (1 tensors in all)" in call("verify", folder).stderr
    changed = {f"x.{key}" if "q_proj.weight" in key else key: value for key, value in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata=metadata)
    done = call("verify", folder)
    assert (done.exit_code, "the configuration or a weight of" in done.stderr) == (1, True)


@pytest.mark.parametrize("settings", [{}, {"bits": "many"}, {"nbits": [4]}, {"weight_quant_params": 5}], ids=str)
def test_settings_that_a_library_cannot_read(folder: Path, settings: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    for method in ("bitsandbytes", "compressed-tensors", "gptq", "hqq", "quanto", "torchao"):
        config["quantization_config"] = {"quant_method": method, **settings}
        (folder / "config.json").write_text(json.dumps(config))
        with suppress(GlowQError) if method != "hqq" else pytest.raises(GlowQError):
            load_model(str(folder), load_config(str(folder)))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"do_sample": [1], "max_length": {}}', b'{"max_length": "x"}'])
def test_a_damaged_generation_config(rank_8: Path, tmp_path: Path, content: bytes) -> None:
    folder = Path(shutil.copytree(rank_8, tmp_path / "copy"))
    (folder / "generation_config.json").write_bytes(content)
    with suppress(GlowQError):
        Correction.from_pretrained(folder)


def test_no_path_holds_a_nul(rank_8: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="neither a folder nor"):
        glowq.Correction.from_pretrained("a\0b")
    with pytest.raises(OutputError, match="cannot be the path of a folder"):
        glowq.Correction.from_pretrained(rank_8).save_pretrained("a\0b")
    for command in (
        ["inspect", "a\0b"],
        ["verify", "a\0b"],
        ["run", "a\0b"],
        ["select", rank_8, "--budget", "1%", "--output", "a\0b"],
        ["select", "a\0b", "--budget", "1%", "--output", tmp_path / "out"],
        ["export", rank_8, "--to", "peft", "--output", "a\0b"],
        ["correct", source, "--base", "nf4", "--calibration", "a\0b", "--output", tmp_path / "out"],
        ["correct", source, "--base", "nf4", "--calibration", "python-stdlib", "--output", "a\0b"],
    ):
        assert r"\x00" in one_line(*command)


def test_a_complete_variant_is_not_said_to_be_incomplete(source: Path, tmp_path: Path) -> None:
    load(source).save_pretrained(tmp_path / "variant", variant="fp16")
    assert checkpoint_files(tmp_path / "variant") == [str(tmp_path / "variant" / "model.fp16.safetensors")]
    model = load_model(str(tmp_path / "variant"), load_config(str(tmp_path / "variant")))
    assert gap(model, logits(load(source))) == 0.0


def test_a_quantizer_that_skipped_every_layer_did_not_dequantize(source: Path) -> None:
    skipping = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["model", "lm_head"])
    model = load(source, quantization_config=skipping)
    with pytest.raises(UnsupportedModuleError, match="bitsandbytes, which left every linear layer as it is"):
        correct(model, source)


def test_an_architecture_of_another_model_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    with pytest.raises(ConfigError, match="BertModel, which is for BertConfig, and the model type 'llama'"):
        model_class(load_config(str(folder)))
