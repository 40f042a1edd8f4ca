"""Read a model file of CTranslate2 as data, and write a Whisper model of it as an ordinary checkpoint."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from glowq.errors import CorrectionError

__all__ = ["is_ctranslate2", "write_whisper"]

VERSION = 6
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
# Of the multilingual models.
TOKENS = {"bos_token_id": 50257, "eos_token_id": 50257, "pad_token_id": 50257, "decoder_start_token_id": 50258}


def is_ctranslate2(file: Path) -> bool:
    """Whether a file begins as a Whisper model of CTranslate2 does."""
    with file.open("rb") as opened:
        return opened.read(4) == struct.pack("<I", VERSION) and opened.read(13) == b"\x0c\x00WhisperSpec"


def write_whisper(file: Path, folder: Path) -> None:
    """Write a multilingual Whisper model, float16 in the file, as a bfloat16 checkpoint, with its feature extractor.

    Raises:
        CorrectionError: the file ends too early, or its weights are not those of a Whisper model.
    """
    stored = {name: torch.from_numpy(value) for name, value in _read(file).items()}
    try:
        sizes = _sizes(stored)
        model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **TOKENS))  # type: ignore[arg-type]
        found = model.load_state_dict(_renamed(stored, sizes), strict=False)
    except (KeyError, RuntimeError) as error:
        raise CorrectionError(f"{file} is no Whisper model of CTranslate2: {error}.") from error
    if found.unexpected_keys or found.missing_keys != ["proj_out.weight"]:  # the head is the embeddings' weight
        raise CorrectionError(f"{file} holds other weights than a Whisper model: {found}.")
    model.bfloat16().save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=sizes["num_mel_bins"]).save_pretrained(folder)


def _sizes(stored: dict[str, Tensor]) -> dict[str, int]:
    """The fields of `WhisperConfig` that the weights' shapes say."""
    vocabulary, width = stored["decoder/embeddings/weight"].shape
    sizes = {"vocab_size": vocabulary, "d_model": width, "num_mel_bins": stored["encoder/conv1/weight"].shape[1]}
    places = {"max_source_positions": "encoder", "max_target_positions": "decoder"}
    sizes |= {name: len(stored[f"{side}/position_encodings/encodings"]) for name, side in places.items()}
    for side in places.values():
        layers = {name.split("/")[1] for name in stored if name.startswith(f"{side}/layer_") and name.count("/") > 2}
        sizes |= {
            f"{side}_layers": len(layers),
            f"{side}_attention_heads": int(stored[f"{side}/num_heads"]),
            f"{side}_ffn_dim": len(stored[f"{side}/layer_0/ffn/linear_0/bias"]),
        }
    return sizes


def _read(file: Path) -> dict[str, NDArray[Any]]:
    """Every variable of the file: name -> values, of the dtype and shape that the file says."""
    found = {}
    with file.open("rb") as opened:
        _number(opened, "I")
        _text(opened)
        _number(opened, "I")
        for _ in range(_number(opened, "I")):
            name = _text(opened)
            shape = [_number(opened, "I") for _ in range(_number(opened, "B"))]
            kind = DTYPES[_number(opened, "B")]
            content = _bytes(opened, _number(opened, "I"))
            found[name] = np.frombuffer(bytearray(content), kind).reshape(shape)
    return found


def _number(opened: BinaryIO, code: str) -> int:
    (found,) = struct.unpack(f"<{code}", _bytes(opened, struct.calcsize(code)))
    return int(found)


def _text(opened: BinaryIO) -> str:
    return _bytes(opened, _number(opened, "H")).rstrip(b"\0").decode()


def _bytes(opened: BinaryIO, size: int) -> bytes:
    found = opened.read(size)
    if len(found) != size:
        raise CorrectionError(f"{opened.name} ends too early: it is damaged. Fetch it again.")
    return found


def _renamed(stored: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
    """The weights by transformers' names. CTranslate2 stacks q, k and v, and in cross-attention k and v."""
    weights: dict[str, Tensor] = {}

    def linear(source: str, *targets: str) -> None:
        for part in ("weight", "bias"):
            for target, value in zip(targets, stored[f"{source}/{part}"].chunk(len(targets)), strict=True):
                if part == "weight" or not target.endswith("k_proj"):  # Whisper's keys have no bias
                    weights[f"{target}.{part}"] = value

    def norm(source: str, target: str) -> None:
        weights[f"{target}.weight"], weights[f"{target}.bias"] = stored[f"{source}/gamma"], stored[f"{source}/beta"]

    for side in ("encoder", "decoder"):
        for index in range(sizes[f"{side}_layers"]):
            source, target = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            linear(f"{source}/self_attention/linear_0", *(f"{target}.self_attn.{name}_proj" for name in "qkv"))
            linear(f"{source}/self_attention/linear_1", f"{target}.self_attn.out_proj")
            norm(f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
            if side == "decoder":
                linear(f"{source}/attention/linear_0", f"{target}.encoder_attn.q_proj")
                linear(f"{source}/attention/linear_1", *(f"{target}.encoder_attn.{name}_proj" for name in "kv"))
                linear(f"{source}/attention/linear_2", f"{target}.encoder_attn.out_proj")
                norm(f"{source}/attention/layer_norm", f"{target}.encoder_attn_layer_norm")
            linear(f"{source}/ffn/linear_0", f"{target}.fc1")
            linear(f"{source}/ffn/linear_1", f"{target}.fc2")
            norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        weights[f"model.{side}.embed_positions.weight"] = stored[f"{side}/position_encodings/encodings"]
    linear("encoder/conv1", "model.encoder.conv1")
    linear("encoder/conv2", "model.encoder.conv2")
    weights["model.decoder.embed_tokens.weight"] = stored["decoder/embeddings/weight"]
    return weights
