"""Models that hold more than the checkpoint they come from: a new head, resized embeddings, layers left random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
)

import glowq
from glowq.errors import BackendError, CalibrationError, ConfigError, ReferenceMismatchError
from support.tiny import CALIBRATION, CHEAP, EXAMPLE, TEXTS, VOCABULARY, correct, quantized, tiny_llama

BERT = BertConfig(
    **VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_labels=3
)
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    found = {"llama": tiny_llama(folder / "llama", num_hidden_layers=1, dtype=torch.float32)}
    torch.manual_seed(0)
    for name, kind in (("masked", BertForMaskedLM), ("encoder", BertModel)):
        kind(BERT).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(EXAMPLE).save_pretrained(folder / name)
        found[name] = folder / name
    return found


def load(auto_class: Any, folder: Path, base: str = "torchao-int4") -> Any:
    return auto_class.from_pretrained(folder, quantization_config=glowq.GlowQConfig(base=base).base)


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS)[0]
    return found


NEW_HEADS = {
    "a classifier on a decoder": (AutoModelForSequenceClassification, "llama", r"'score\.weight'"),
    "a classifier on an encoder": (AutoModelForSequenceClassification, "masked", r"'bert\.pooler\.dense\.bias'"),
    "a pooler": (AutoModel, "masked", r"'pooler\.dense\.bias'"),
    "a language head": (AutoModelForMaskedLM, "encoder", r"'cls\.predictions\.bias'"),
}


@pytest.mark.parametrize("kind", NEW_HEADS)
def test_the_reference_uses_the_new_head_of_the_model(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    auto_class, source, lacking = NEW_HEADS[kind]
    model = load(auto_class, sources[source])
    correction = correct(model, sources[source], **CHEAP)
    with pytest.raises(ConfigError, match=f"the base's checkpoint lacks {lacking}.*Save the model in one piece"):
        correction.save_pretrained(tmp_path / "correction")
    assert not (tmp_path / "correction").exists()
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(answer(auto_class.from_pretrained(tmp_path / "full")), answer(model))


def test_the_reference_uses_the_heads_values_of_now(sources: dict[str, Path]) -> None:
    model = load(AutoModelForMaskedLM, sources["encoder"])
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    correction = correct(model, sources["encoder"], rank=16, force=True)
    found = correction.config.provenance.improvement
    assert found is not None
    assert 0 < found["quantized"] < 1  # nats; between two different heads it is larger


@pytest.mark.parametrize(("base", "option"), [("nf4", "llm_int8_skip_modules"), ("quanto-int4", "modules_to_not_conv")])
def test_a_new_module_that_a_library_left_broken_is_named_with_the_remedy(
    base: str, option: str, sources: dict[str, Path]
) -> None:
    model = load(AutoModel, sources["masked"], base)
    with pytest.raises(BackendError, match=rf"pooler\.dense: .*name the module in {option}"):
        correct(model, sources["masked"], **CHEAP)


def test_a_quantized_weight_that_the_reference_lacks_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    tensors = BertForMaskedLM.from_pretrained(sources["masked"]).state_dict()
    name = "bert.encoder.layer.0.output.dense.weight"
    BertForMaskedLM(BERT).save_pretrained(
        tmp_path, state_dict={key: value for key, value in tensors.items() if key != name}
    )
    AutoTokenizer.from_pretrained(EXAMPLE).save_pretrained(tmp_path)
    with pytest.raises(ReferenceMismatchError, match=f"holds no {name!r}.*it is another model"):
        correct(load(AutoModelForMaskedLM, sources["masked"]), tmp_path, **CHEAP)


@pytest.mark.parametrize("tokens", [4000, 4100])
def test_resized_embeddings(tokens: int, sources: dict[str, Path], tmp_path: Path) -> None:
    model = quantized(sources["llama"], "torchao-int4")
    plain = correct(quantized(sources["llama"], "torchao-int4"), sources["llama"], rank=4, force=True)
    model.resize_token_embeddings(tokens)
    texts = [text for text in TEXTS if max(AutoTokenizer.from_pretrained(EXAMPLE)(text)["input_ids"]) < tokens]
    correction = correct(model, sources["llama"], calibration=texts, rank=4, force=True)
    assert list(correction.ranks.values()) == list(plain.ranks.values())
    with pytest.raises(ConfigError, match=rf"resized to {tokens} tokens \(the base has 4096\).*in one piece"):
        correction.save_pretrained(tmp_path / "correction")
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(answer(AutoModelForCausalLM.from_pretrained(tmp_path / "full")), answer(model))


def test_new_tokens_in_the_calibration_text_are_refused_before_the_work(sources: dict[str, Path]) -> None:
    model = quantized(sources["llama"], "torchao-int4")
    model.resize_token_embeddings(4100)
    ids = torch.full((8, 128), 4099)
    forwards: list[nn.Module] = []
    model.model.layers[0].register_forward_hook(lambda block, *_: forwards.append(block))
    with pytest.raises(CalibrationError, match="token id 4099, and the reference has embeddings for 4096: "):
        glowq.correct(model, reference=sources["llama"], calibration=ids, **{**CHEAP, **CALIBRATION})
    assert len(forwards) == 1  # the trace


def test_layers_that_a_quantizer_left_random_are_refused(tmp_path: Path) -> None:
    """torchao does not split NomicBert's fused weight: k and v stay random, and transformers only reports it."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    AutoModel.from_config(AutoConfig.for_model("nomic_bert", **VOCABULARY, **small)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(EXAMPLE).save_pretrained(tmp_path)
    with pytest.raises(
        ReferenceMismatchError, match=r"k_proj, which is not quantized, has cosine similarity -?0\.[012]"
    ):
        correct(load(AutoModel, tmp_path), tmp_path)
