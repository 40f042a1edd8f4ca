"""Models that HQQ saved, and ways of loading them that would silently give wrong weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import HqqConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

import glowq
from glowq.errors import BackendError, ConfigError, FingerprintError
from support import writers
from support.tiny import CHEAP, correct, gap, load, logits

pytest.importorskip("hqq")

from hqq.models.hf.base import AutoHQQHFModel


@pytest.fixture(scope="module")
def stored(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that HQQ saved: a pickle, and a config.json that does not mention HQQ."""
    folder = tmp_path_factory.mktemp("stored")
    writers.hqq(source, folder, nbits=4, group_size=64)
    return folder


@pytest.fixture(scope="module")
def labelled(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with HQQ's tensors in safetensors and a config.json for hqq, as transformers 4 saved it.

    Transformers 5 misreads it.
    """
    model = writers.quantize_with_hqq(source, torch.bfloat16, nbits=4, group_size=64)
    model.config.quantization_config = HqqConfig(nbits=4, group_size=64)
    folder = tmp_path_factory.mktemp("labelled") / "hqq"
    AutoHQQHFModel.save_to_safetensors(model, str(folder))
    return folder


def test_a_model_that_hqq_saved(stored: Path, source: Path, tmp_path: Path) -> None:
    model, fresh = (writers.load_with_hqq(stored, torch.bfloat16) for _ in range(2))
    correction = correct(model, source, **CHEAP)
    expected = logits(model)
    assert gap(fresh, expected) > 0.0
    assert correction.config.base_model["name"] == str(stored)
    correction.save_pretrained(tmp_path / "corr")
    glowq.load_correction(fresh, tmp_path / "corr")
    assert gap(fresh, expected) == 0.0
    with pytest.raises(ConfigError, match=r"Load the base with the library .*glowq\.load_correction"):
        load(tmp_path / "corr")
    with pytest.raises(ConfigError, match=r"in one piece.*the base as its library does"):
        model.save_pretrained(tmp_path / "full")
    glowq.detach(model)
    assert gap(model, logits(writers.load_with_hqq(stored, torch.bfloat16))) == 0.0


def test_hqqs_own_save_of_a_corrected_model_is_still_the_base(stored: Path, source: Path, tmp_path: Path) -> None:
    model = writers.load_with_hqq(stored, torch.bfloat16)
    correct(model, source, **CHEAP).save_pretrained(tmp_path / "corr")
    AutoHQQHFModel.save_quantized(model, str(tmp_path / "again"))
    loaded = writers.load_with_hqq(tmp_path / "again", torch.bfloat16)
    assert gap(loaded, logits(writers.load_with_hqq(stored, torch.bfloat16))) == 0.0
    glowq.load_correction(loaded, tmp_path / "corr")
    assert gap(loaded, logits(model)) == 0.0


def test_other_settings_are_another_base(stored: Path, source: Path, tmp_path: Path) -> None:
    correct(writers.load_with_hqq(stored, torch.bfloat16), source, **CHEAP).save_pretrained(tmp_path)
    other = writers.quantize_with_hqq(source, torch.bfloat16, nbits=4, group_size=32)
    with pytest.raises(FingerprintError, match="other quantization settings"):
        glowq.load_correction(other, tmp_path)


def test_a_checkpoint_that_transformers_would_misread_is_refused(labelled: Path) -> None:
    with pytest.raises(BackendError, match=r"random weights.*AutoHQQHFModel\.from_quantized"):
        load(labelled)


@pytest.mark.parametrize("dense", [False, True])
def test_a_model_that_transformers_gave_random_weights_is_refused(
    dense: bool, labelled: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "hqq", HqqHfQuantizer)  # the state before glowq is imported
    model = load(labelled)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear, "transformers has learnt to load HQQ"
    with pytest.raises(BackendError, match="loaded before glowq was imported, by HqqHfQuantizer"):
        correct(model, source, dense=dense)


def test_a_correction_whose_base_transformers_would_misread_is_refused(
    labelled: Path, source: Path, tmp_path: Path
) -> None:
    model = writers.quantize_with_hqq(source, torch.bfloat16, nbits=4, group_size=64)
    model.config.quantization_config = HqqConfig(nbits=4, group_size=64)
    model.config._name_or_path = str(labelled)
    correct(model, source, **CHEAP).save_pretrained(tmp_path)
    with pytest.raises(BackendError, match=r"random weights.*AutoHQQHFModel\.from_quantized"):
        load(tmp_path)
