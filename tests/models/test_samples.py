"""Which models have a decoder that reads inputs of its own, and which read no text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PixtralVisionConfig,
    PixtralVisionModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from glowq.errors import CalibrationError
from glowq.models.samples import checked_samples, is_encoder_decoder, refuse_text
from support.tiny import tiny_llama

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def t5() -> T5Config:
    return T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=64)


def test_an_encoder_with_a_decoder() -> None:
    assert is_encoder_decoder(T5ForConditionalGeneration(t5()))


def test_the_encoder_alone_is_none() -> None:
    """Its config describes the whole model."""
    assert not is_encoder_decoder(T5EncoderModel(t5()))


def test_decoders_and_other_modules_are_none(tmp_path: Path) -> None:
    assert not is_encoder_decoder(AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "llama")))
    assert not is_encoder_decoder(nn.Linear(2, 2))


def test_text_is_refused_where_it_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"^ViTModel reads pixel_values, and the calibration is text: give "):
        refuse_text(ViTModel(ViTConfig(**SMALL)))
    for model in (T5EncoderModel(t5()), AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "llama"))):
        refuse_text(model)
        refuse_text(model, failed=True)


@pytest.mark.parametrize("kind", ["vit", "pixtral"])
def test_images_that_a_model_lays_in_one_row_are_run_one_by_one(kind: str) -> None:
    model = ViTModel(ViTConfig(**SMALL)) if kind == "vit" else PixtralVisionModel(PixtralVisionConfig(**SMALL))
    images = [{"pixel_values": torch.randn(1, 3, 16, 16)} for _ in range(3)]
    found = checked_samples(model, images, None, None)
    assert [len(batch["pixel_values"]) for batch in found.split(2)] == ([2, 1] if kind == "vit" else [1, 1, 1])
    assert found[1:].in_batches == found[[0, 1]].in_batches == (kind == "vit")
