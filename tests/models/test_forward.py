"""Models that can be calibrated with text alone; an encoder with a decoder cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5EncoderModel, T5ForConditionalGeneration

from glowq.errors import UnsupportedModuleError
from glowq.models.forward import refuse_encoder_decoder
from support.tiny import tiny_llama


def t5() -> T5Config:
    return T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=64)


def test_an_encoder_with_a_decoder_is_refused() -> None:
    with pytest.raises(
        UnsupportedModuleError,
        match=r"^T5ForConditionalGeneration is an encoder with a decoder, .* calibration text gives no decoder input",
    ):
        refuse_encoder_decoder(T5ForConditionalGeneration(t5()))


def test_the_encoder_alone_is_not() -> None:
    refuse_encoder_decoder(T5EncoderModel(t5()))


def test_decoders_and_other_modules_are_not(tmp_path: Path) -> None:
    refuse_encoder_decoder(AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "llama")))
    refuse_encoder_decoder(nn.Linear(2, 2))
