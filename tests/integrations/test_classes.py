"""A correction made for one class of a model is loaded in another: `AutoModel`, or a class with another head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)

import glowq
from glowq.errors import FingerprintError
from glowq.runtime.attach import attached
from support.tiny import CHEAP, EXAMPLE, VOCABULARY, correct, tiny_llama

IDS = torch.arange(24).reshape(2, 12)
BASES = ["nf4", "torchao-int4", "hqq-4", "quanto-int4"]
FORMS = [("nf4", "full"), ("torchao-int4", "full"), *((base, "correction") for base in BASES)]
CLASSES = {"decoder": AutoModelForCausalLM, "encoder": AutoModelForMaskedLM}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("classes")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**VOCABULARY, **sizes)).save_pretrained(folder / "encoder")
    AutoTokenizer.from_pretrained(EXAMPLE).save_pretrained(folder / "encoder")
    return {"decoder": tiny_llama(folder / "decoder", dtype=torch.float32), "encoder": folder / "encoder"}


@pytest.fixture(scope="module")
def saved(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kind of model, base -> the corrected model and the folder of its forms. Each is made once."""
    made: dict[tuple[str, str], tuple[Any, Path]] = {}

    def of(kind: str, base: str) -> tuple[Any, Path]:
        if (kind, base) not in made:
            folder = tmp_path_factory.mktemp("saved")
            config = glowq.GlowQConfig(base=base).base
            model = CLASSES[kind].from_pretrained(sources[kind], quantization_config=config)
            correct(model, sources[kind], **CHEAP).save_pretrained(folder / "correction")
            if (base, "full") in FORMS:
                model.save_pretrained(folder / "full")
                AutoTokenizer.from_pretrained(EXAMPLE).save_pretrained(folder / "full")
            made[kind, base] = model, folder
        return made[kind, base]

    return of


def states(model: Any) -> Tensor:
    """The last hidden states, shape (2, 12, width), without the model's head."""
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    return found


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize(("base", "form"), FORMS)
@pytest.mark.parametrize("kind", CLASSES)
def test_the_backbone_computes_the_same_in_every_class(
    saved: Any, kind: str, base: str, form: str, auto_class: Any, tmp_path: Path
) -> None:
    model, folder = saved(kind, base)
    found = auto_class.from_pretrained(folder / form)
    assert torch.equal(states(found), states(model))
    heads = sum(name.startswith("cls.") for name in attached(model))
    assert len(attached(found)) == len(attached(model)) - heads
    if (base, "full") not in FORMS:
        return
    # What is saved under the names of the new class is a variant of its own.
    found.save_pretrained(tmp_path)
    again = auto_class.from_pretrained(tmp_path)
    assert torch.equal(states(again), states(model))
    assert list(attached(again)) == list(attached(found))


def test_a_correction_of_the_backbone_fits_the_model_with_a_head(sources: dict[str, Path], tmp_path: Path) -> None:
    config = glowq.GlowQConfig(base="nf4").base
    inner = AutoModel.from_pretrained(sources["decoder"], quantization_config=config)
    correct(inner, sources["decoder"], **CHEAP).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(states(whole), states(inner))
    assert len(attached(whole)) == len(attached(inner)) == 8
    loaded = AutoModelForCausalLM.from_pretrained(sources["decoder"], quantization_config=config)
    glowq.load_correction(loaded, tmp_path)
    assert torch.equal(states(loaded), states(inner))


@pytest.mark.parametrize("form", ["correction", "full"])
def test_sentence_transformers_load_the_correction_of_a_masked_language_model(saved: Any, form: str) -> None:
    model, folder = saved("encoder", "torchao-int4")
    found = SentenceTransformer(str(folder / form), device="cpu")
    assert torch.equal(states(found[0].auto_model), states(model))


def test_other_weights_are_refused_in_another_class_too(saved: Any, sources: dict[str, Path], tmp_path: Path) -> None:
    _, folder = saved("decoder", "nf4")
    stored = json.loads((folder / "correction" / "config.json").read_text())
    stored["quantization_config"]["base_model"]["name"] = str(tiny_llama(tmp_path / "other", seed=1))
    for file in (folder / "correction").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(FingerprintError, match="was made for quantized weights"):
        AutoModel.from_pretrained(tmp_path)
