"""A Whisper model in a file of CTranslate2 becomes a checkpoint of transformers with the same weights."""

from __future__ import annotations

import runpy
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import WhisperConfig, WhisperForConditionalGeneration

from glowq.errors import CorrectionError
from support.tiny import seeded

SCRIPT = Path(__file__).parents[2] / "examples" / "whisper_file.py"
SIZES: dict[str, Any] = {
    "vocab_size": 51865,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 32,
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": 10,
}


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    with seeded(0):
        found = WhisperForConditionalGeneration(WhisperConfig(**SIZES))
        for parameter in found.parameters():
            parameter.data.normal_(std=0.2)
    return found.half()


def variables(model: WhisperForConditionalGeneration) -> dict[str, NDArray[Any]]:
    """The model's weights by CTranslate2's names."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    found: dict[str, NDArray[Any]] = {}

    def put(target: str, *sources: str, bias: bool = True) -> None:
        found[f"{target}/weight"] = np.concatenate([weights[f"{source}.weight"] for source in sources])
        found[f"{target}/bias"] = np.concatenate(
            [weights.get(f"{source}.bias", np.zeros(SIZES["d_model"], np.float16)) for source in sources]
        )

    def norm(target: str, source: str) -> None:
        found[f"{target}/gamma"], found[f"{target}/beta"] = weights[f"{source}.weight"], weights[f"{source}.bias"]

    for side in ("encoder", "decoder"):
        for index in range(SIZES[f"{side}_layers"]):
            here, there = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            put(f"{here}/self_attention/linear_0", *(f"{there}.self_attn.{name}_proj" for name in "qkv"))
            put(f"{here}/self_attention/linear_1", f"{there}.self_attn.out_proj")
            norm(f"{here}/self_attention/layer_norm", f"{there}.self_attn_layer_norm")
            if side == "decoder":
                put(f"{here}/attention/linear_0", f"{there}.encoder_attn.q_proj")
                put(f"{here}/attention/linear_1", *(f"{there}.encoder_attn.{name}_proj" for name in "kv"))
                put(f"{here}/attention/linear_2", f"{there}.encoder_attn.out_proj")
                norm(f"{here}/attention/layer_norm", f"{there}.encoder_attn_layer_norm")
            put(f"{here}/ffn/linear_0", f"{there}.fc1")
            put(f"{here}/ffn/linear_1", f"{there}.fc2")
            norm(f"{here}/ffn/layer_norm", f"{there}.final_layer_norm")
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        found[f"{side}/position_encodings/encodings"] = weights[f"model.{side}.embed_positions.weight"]
        found[f"{side}/num_heads"] = np.array(SIZES[f"{side}_attention_heads"], np.int16)
    put("encoder/conv1", "model.encoder.conv1")
    put("encoder/conv2", "model.encoder.conv2")
    found["decoder/embeddings/weight"] = weights["model.decoder.embed_tokens.weight"]
    return found


def written(file: Path, values: dict[str, NDArray[Any]]) -> Path:
    """Write a file as CTranslate2 does (version 6)."""
    kinds = {"float16": 4, "int16": 2}

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    content = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(values))
    for name, value in values.items():
        content += text(name) + struct.pack("<B", value.ndim) + struct.pack(f"<{value.ndim}I", *value.shape)
        content += struct.pack("<BI", kinds[value.dtype.name], value.nbytes) + np.ascontiguousarray(value).tobytes()
    file.write_bytes(content + struct.pack("<I", 0))
    return file


def test_the_checkpoint_has_the_weights_of_the_file(model: WhisperForConditionalGeneration, tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPT))
    file = written(tmp_path / "model.bin", variables(model))
    assert script["is_ctranslate2"](file)
    script["write_whisper"](file, tmp_path / "whisper")
    found = WhisperForConditionalGeneration.from_pretrained(tmp_path / "whisper", dtype=torch.bfloat16)
    assert {name: getattr(found.config, name) for name in SIZES} == SIZES
    expected = model.bfloat16().state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize("fault", ["ends early", "lacks a weight", "other format"])
def test_other_files_are_refused_by_name(fault: str, model: WhisperForConditionalGeneration, tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPT))
    values = variables(model.half())
    if fault == "lacks a weight":
        del values["encoder/conv2/weight"]
    file = written(tmp_path / "model.bin", values)
    if fault == "ends early":
        file.write_bytes(file.read_bytes()[:-100_000])
    if fault == "other format":
        file.write_bytes(b"GGUF" + file.read_bytes())
        assert not script["is_ctranslate2"](file)
        return
    with pytest.raises(CorrectionError, match=r"model\.bin"):
        script["write_whisper"](file, tmp_path / "whisper")
    assert not (tmp_path / "whisper").exists()
