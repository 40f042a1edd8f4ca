"""Models that read images, sound, or a text with an answer; and models with other heads than one for the next token."""

from __future__ import annotations

import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoConfig

import glowq
from glowq.errors import CalibrationError, ConfigError, TokenizerMismatchError
from glowq.runtime.attach import attached
from support.cli import call, result_of
from support.kinds import IMAGES, SIZES, SOUND, SPEECH, llava, save
from support.tiny import TEXTS, seeded

SEQ2SEQ = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 4096}
SEQ2SEQ |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
BART = {**SPEECH, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1}
BERT = {**SIZES, "num_labels": 5}
RERANKER = {**SIZES, "num_labels": 1}
TOKENIZER = transformers.AutoTokenizer.from_pretrained  # called with the folder of the model
CHEAP_TEXT = {"calibration_tokens": 1536, "sequence_length": 64}


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 4096, shape, generator=torch.Generator().manual_seed(seed))


def images(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    return [{"pixel_values": values(1, 3, 32, 32, seed=seed + number)} for number in range(count)]


def sounds(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    return [{"input_values": values(1, 800, seed=seed + number)} for number in range(count)]


def speech(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    return [{"input_features": values(1, 20, 80, seed=seed + number)} for number in range(count)]


def pictured(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """An image, whose 16 patches stand before a text."""
    found = []
    for number in range(count):
        text = ids(1, 24, seed=seed + number)
        text[:, :16] = 300
        found.append({"input_ids": text, **images(1, seed + number)[0]})
    return found


def two_models() -> Any:
    """An encoder and a decoder of two other models; the start token is named in the decoder's config alone."""
    decoder = {**SIZES, "is_decoder": True, "add_cross_attention": True}
    parts = [AutoConfig.for_model("bert", **SIZES), AutoConfig.for_model("bert", **decoder)]
    return transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)


def both(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """An image and a text, each by itself, which ends with the end token."""
    found = [{"input_ids": ids(1, 12, seed=seed + number), **images(1, seed + number)[0]} for number in range(count)]
    for sample in found:
        sample["input_ids"][:, -1] = 4095
    return found


KINDS: dict[str, tuple[str, Callable[[], Any], Callable[..., list[dict[str, Tensor]]] | None]] = {
    "images": ("AutoModelForImageClassification", lambda: AutoConfig.for_model("vit", **IMAGES, num_labels=7), images),
    "states of images": ("AutoModel", lambda: AutoConfig.for_model("dinov2", **IMAGES), images),
    "sound": ("AutoModel", lambda: AutoConfig.for_model("hubert", **SOUND), sounds),
    "letters of sound": ("AutoModelForCTC", lambda: AutoConfig.for_model("wav2vec2", **SOUND), sounds),
    "speech": ("AutoModelForSpeechSeq2Seq", lambda: AutoConfig.for_model("whisper", **SPEECH), speech),
    "images and text": ("AutoModelForImageTextToText", llava, pictured),
    "both": ("AutoModel", lambda: AutoConfig.for_model("clip", text_config=SIZES, vision_config=IMAGES), both),
    "t5": ("AutoModelForSeq2SeqLM", lambda: AutoConfig.for_model("t5", **SEQ2SEQ), None),
    "bart": ("AutoModelForSeq2SeqLM", lambda: AutoConfig.for_model("bart", **BART), None),
    "two models": ("AutoModelForSeq2SeqLM", two_models, None),
    "labels": ("AutoModelForSequenceClassification", lambda: AutoConfig.for_model("bert", **BERT), None),
    "one label": (
        "AutoModelForSequenceClassification",
        lambda: AutoConfig.for_model("bert", **BERT | {"num_labels": 1}),
        None,
    ),
    "labels of tokens": ("AutoModelForTokenClassification", lambda: AutoConfig.for_model("roberta", **BERT), None),
    "answers in a text": ("AutoModelForQuestionAnswering", lambda: AutoConfig.for_model("distilbert", **SIZES), None),
}


def quantized(kind: str, folder: Path, base: str = "nf4") -> Any:
    """The quantized model of a kind; `folder` holds its weights, scaled so that quantization changes the answers."""
    auto = getattr(transformers, KINDS[kind][0])
    if not (folder / "config.json").is_file():
        save(KINDS[kind][1](), auto, folder)
        model = auto.from_pretrained(folder)
        with torch.no_grad(), seeded(1):
            for weight in (part for part in model.parameters() if part.dim() == 2):
                weight.normal_(std=0.15)
        model.save_pretrained(folder)
    return auto.from_pretrained(folder, quantization_config=glowq.GlowQConfig(base=base).base)


def tensors(output: Any) -> list[Tensor]:
    names = (
        "logits",
        "start_logits",
        "end_logits",
        "last_hidden_state",
        "pooler_output",
        "text_embeds",
        "image_embeds",
    )
    found = [value for name in names if isinstance(value := getattr(output, name, None), Tensor)]
    assert found
    return found


def answers(model: nn.Module, samples: list[dict[str, Tensor]]) -> list[Tensor]:
    with torch.no_grad():
        return [part for sample in samples for part in tensors(model(**sample))]


def held_out(kind: str, model: Any) -> list[dict[str, Tensor]]:
    make = KINDS[kind][2]
    found = [{"input_ids": ids(1, 48, seed=900 + number)} for number in range(8)] if make is None else make(8, seed=900)
    if model.config.is_encoder_decoder:
        found = [{**sample, "decoder_input_ids": ids(1, 12, seed=number)} for number, sample in enumerate(found)]
    return found


def given(kind: str) -> dict[str, Any]:
    make = KINDS[kind][2]
    if make is not None:
        return {"calibration": make(24)}
    return {"calibration": TEXTS * 4, **CHEAP_TEXT, "tokenizer": TOKENIZER}


def correct(model: Any, folder: Path, kind: str, **options: Any) -> glowq.Correction:
    settings = {"rank": 8, "force": True, **given(kind), **options}
    if "tokenizer" in settings:
        settings["tokenizer"] = settings["tokenizer"](folder)
    return glowq.correct(model, reference=folder, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_nearer_to_its_reference_and_can_be_loaded(kind: str, tmp_path: Path) -> None:
    model, auto = quantized(kind, tmp_path / "source"), getattr(transformers, KINDS[kind][0])
    samples = held_out(kind, model)
    correction = correct(model, tmp_path / "source", kind)
    found = answers(model, samples)
    with glowq.disabled(model):
        plain = answers(model, samples)
    exact = answers(auto.from_pretrained(tmp_path / "source"), samples)

    def distance(ours: list[Tensor]) -> float:
        return sum(float((one - other).square().sum()) for one, other in zip(ours, exact, strict=True))

    assert distance(found) < distance(plain)
    improvement = correction.config.provenance.improvement
    assert improvement is not None
    assert improvement["corrected"] < improvement["quantized"]
    assert str(correction.config.provenance.gains) != "squared output"
    assert (correction.config.provenance.change is None) == (kind == "both")  # its config tells no input of one forward
    model.save_pretrained(tmp_path / "full")
    again = auto.from_pretrained(tmp_path / "full")
    for ours, theirs in zip(answers(again, samples), found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    done = call("verify", tmp_path / "full")
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("kind", ["images", "speech", "t5", "images and text"])
def test_a_budget_goes_to_the_groups_that_gain(kind: str, tmp_path: Path) -> None:
    model = quantized(kind, tmp_path / "source")
    correction = correct(model, tmp_path / "source", kind, rank=None, budget="10%")
    assert 0 < correction.overhead <= 0.1
    provenance = correction.config.provenance
    assert str(provenance.gains) == "nats"
    assert provenance.measured_tokens
    assert len(attached(model)) == len(correction.factors)


def test_both_towers_are_corrected(tmp_path: Path) -> None:
    model = quantized("images and text", tmp_path / "source")
    found = {entry.group.name for entry in correct(model, tmp_path / "source", "images and text").factors}
    for tower in ("vision_tower", "language_model", "multi_modal_projector"):
        assert any(tower in name for name in found), found


def test_the_decoder_reads_the_second_half_of_a_text(tmp_path: Path) -> None:
    """Its cross attention reads the encoder: k and v of a layer share a factor, and q does not."""
    model = quantized("t5", tmp_path / "source")
    groups = {entry.group.members for entry in correct(model, tmp_path / "source", "t5").factors}
    layer = "decoder.block.0.layer.1.EncDecAttention"
    assert (f"{layer}.k", f"{layer}.v") in groups
    assert (f"{layer}.q",) in groups


def loader(count: int) -> DataLoader[Any]:
    return DataLoader(images(count), batch_size=4, collate_fn=joined)  # type: ignore[arg-type]


def joined(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


FORMS: dict[str, Callable[[], Any]] = {
    "a batch": lambda: joined(images(16)),
    "batches": lambda: [joined(images(16)[:4]), joined(images(16)[4:])],
    "arrays": lambda: [{"pixel_values": sample["pixel_values"].numpy()} for sample in images(16)],
    "a function": lambda: lambda: iter(images(16)),
    "an iterator": lambda: iter(images(16)),
    "a loader": lambda: loader(16),
}


@pytest.mark.parametrize("form", FORMS)
def test_samples_in_every_form_are_the_same_samples(form: str, tmp_path: Path) -> None:
    found = []
    for calibration in (images(16), FORMS[form]()):
        model = quantized("images", tmp_path / "source")
        correction = correct(model, tmp_path / "source", "images", calibration=calibration, method="qera")
        found.append(correction.factors)
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.right, theirs.right)


def test_a_function_without_an_end_gives_as_many_samples_as_the_tokens_are(tmp_path: Path) -> None:
    def endless() -> Iterator[dict[str, Tensor]]:
        seed = 0
        while True:
            yield images(1, seed)[0]
            seed += 1

    model = quantized("images", tmp_path / "source")
    options = {"calibration": endless, "calibration_tokens": 17 * 16, "method": "qera"}
    correction = correct(model, tmp_path / "source", "images", **options)
    assert correction.config.provenance.calibration_tokens == 17 * 16  # 16 patches and the class token


def test_padding_counts_for_nothing(tmp_path: Path) -> None:
    """The oracle: the same texts without padding, one sample each."""
    lengths, found = (9, 30, 17, 24, 12, 28, 20, 15), []
    texts = [ids(1, length, seed=length) for length in lengths]
    padded, mask = torch.zeros(len(texts), 30, dtype=torch.int64), torch.zeros(len(texts), 30, dtype=torch.int64)
    for row, text in enumerate(texts):
        padded[row, : text.shape[1]], mask[row, : text.shape[1]] = text[0], 1
    answers_given = {"decoder_input_ids": ids(8, 6), "decoder_attention_mask": torch.ones(8, 6, dtype=torch.int64)}
    whole = {"input_ids": padded, "attention_mask": mask, **answers_given}
    single = [
        {"input_ids": text, "decoder_input_ids": answers_given["decoder_input_ids"][row : row + 1]}
        for row, text in enumerate(texts)
    ]
    for calibration in (whole, single):
        model = quantized("t5", tmp_path / "source")
        options = {"calibration": calibration, "method": "qera", "seed": 1, "rank": 4}
        found.append(correct(model, tmp_path / "source", "t5", **options).factors)
    for ours, theirs in zip(*found, strict=True):
        product = next(iter(ours.lefts.values())) @ ours.right
        other = next(iter(theirs.lefts.values())) @ theirs.right
        torch.testing.assert_close(product, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_labels_that_count_for_nothing_are_no_input(tmp_path: Path) -> None:
    """The oracle: the same labels without -100, one sample each."""
    lengths, found = (9, 12, 7, 10, 12, 8), []
    texts, labels = ids(len(lengths), 12), torch.full((len(lengths), 12), -100)
    for row, length in enumerate(lengths):
        labels[row, :length] = ids(length, seed=length)
    single = [
        {"input_ids": texts[row : row + 1], "labels": labels[row : row + 1, :length]}
        for row, length in enumerate(lengths)
    ]
    for calibration in ({"input_ids": texts, "labels": labels}, single):
        model = quantized("t5", tmp_path / "source")
        options = {"calibration": calibration, "method": "qera", "rank": 4}
        found.append(correct(model, tmp_path / "source", "t5", **options).factors)
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.right, theirs.right)


@pytest.mark.parametrize("kind", ["labels", "answers in a text", "images"])
def test_the_prediction_counts_as_the_measurement_does(kind: str, tmp_path: Path) -> None:
    """Nats for each label, not for each token of the text that has the label."""
    model = quantized(kind, tmp_path / "source")
    correction = correct(model, tmp_path / "source", kind, rank=None, budget="30%", factor_dtype="float")
    measured = correction.config.provenance.improvement
    assert measured is not None
    assert correction.predicted == pytest.approx(1 - measured["corrected"] / measured["quantized"], abs=0.2)


def test_text_alone_is_enough_where_the_model_needs_no_image(tmp_path: Path) -> None:
    model = quantized("images and text", tmp_path / "source")
    options = {"calibration": TEXTS, "tokenizer": TOKENIZER, **CHEAP_TEXT}
    factors = correct(model, tmp_path / "source", "images and text", **options).factors
    assert factors
    assert all("language_model" in entry.group.name for entry in factors)


BAD: dict[str, tuple[str, Any, type[Exception], str]] = {
    "text for a model of images": (
        "images",
        TEXTS,
        CalibrationError,
        "reads pixel_values, and the calibration",
    ),
    "text for a model of sound": ("sound", TEXTS, CalibrationError, "reads input_values, and the calibration"),
    "text for a model of both": ("both", TEXTS, CalibrationError, "reads pixel_values, and the calibration"),
    "images for a model of text": (
        "labels",
        images(8),
        CalibrationError,
        "holds pixel_values, which BertForSequenceClassification does not take; it takes input_ids, attention_mask",
    ),
    "a wrong key": ("images", [{"pixels": values(1, 3, 32, 32)}] * 4, CalibrationError, "sample 0 holds pixels, which"),
    "no main input": (
        "images and text",
        [{"pixel_values": values(1, 3, 32, 32)}] * 4,
        CalibrationError,
        "holds no input_ids",
    ),
    "a wrong shape": ("images", [{"pixel_values": values(1, 5, 32, 32)}] * 4, CalibrationError, "refuses the calibrat"),
    "no batch dimension": ("images", [{"pixel_values": torch.tensor(1.0)}] * 4, CalibrationError, "batch dimension"),
    "ragged fields": (
        "images and text",
        [{"input_ids": ids(3, 8), "pixel_values": values(2, 3, 32, 32)}],
        CalibrationError,
        r"different numbers of rows \(input_ids 3, pixel_values 2\)",
    ),
    "NaN": ("images", [{"pixel_values": values(1, 3, 32, 32) * torch.nan}] * 4, CalibrationError, "holds NaN or Inf"),
    "an id too large": (
        "images and text",
        [{**sample, "input_ids": sample["input_ids"] + 5000} for sample in pictured(4)],
        TokenizerMismatchError,
        "the model knows 0 to 4095",
    ),
    "labels of another model": (
        "t5",
        {"input_ids": ids(4, 6), "labels": ids(4, 6) + 5000, "decoder_attention_mask": torch.ones(4, 6)},
        TokenizerMismatchError,
        "sample 0: labels holds id .*, the model knows 0 to 4095",
    ),
    "all padding": (
        "t5",
        [{"input_ids": ids(1, 4), "attention_mask": torch.zeros(1, 4), "decoder_input_ids": ids(1, 4)}] * 4,
        CalibrationError,
        "leaves out everything",
    ),
    "nothing": ("images", lambda: iter(()), CalibrationError, "holds no sample"),
    "strings from a function": ("images", lambda: iter(["text"]), CalibrationError, "sample 0 is str"),
    "a number from a function": ("images", lambda: 3, CalibrationError, "calibration gives int"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_samples_are_refused_by_name(case: str, tmp_path: Path) -> None:
    kind, calibration, error, message = BAD[case]
    model = quantized(kind, tmp_path / "source")
    with pytest.raises(error, match=message):
        correct(model, tmp_path / "source", kind, calibration=calibration, tokenizer=TOKENIZER)
    assert not attached(model)


def test_a_base_that_is_quantized_with_text_is_refused(tmp_path: Path) -> None:
    quantized("images", tmp_path / "source")
    config = glowq.GlowQConfig(base="gptq-4", calibration=images(16), rank=4)
    with pytest.raises(ConfigError, match="gptq quantizes with text alone, and the calibration is of another kind"):
        getattr(transformers, KINDS["images"][0]).from_pretrained(tmp_path / "source", quantization_config=config)


def processed(kind: str, folder: Path) -> Path:
    """The model's folder as the Hub has it: with a processor, and without a tokenizer."""
    quantized(kind, folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    if kind == "images":
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        transformers.Wav2Vec2FeatureExtractor(sampling_rate=16_000).save_pretrained(folder)
    return folder


def write_images(folder: Path, count: int) -> Path:
    from PIL import Image

    folder.mkdir()
    for number in range(count):
        pixels = (values(40, 50, 3, seed=number).sigmoid() * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def write_sounds(folder: Path, count: int, rate: int = 16_000) -> Path:
    folder.mkdir()
    for number in range(count):
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, rate, 800, "NONE", ""))
            file.writeframes((values(800, seed=number) * 2**12).short().numpy().tobytes())
    return folder


@pytest.mark.parametrize("form", ["correction", "full"])
@pytest.mark.parametrize(("kind", "write"), [("images", write_images), ("sound", write_sounds)])
def test_the_command_reads_a_folder(kind: str, write: Callable[..., Path], form: str, tmp_path: Path) -> None:
    source, folder = processed(kind, tmp_path / "source"), write(tmp_path / "calibration", 24)
    options = ["--calibration", folder, "--base", "nf4", "--rank", "4", "--format", form, "--output", tmp_path / "out"]
    found = result_of("correct", source, *options)
    assert found["improvement"]["corrected"] < found["improvement"]["quantized"]
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    assert call("verify", tmp_path / "out").exit_code == 0
    model = getattr(transformers, KINDS[kind][0]).from_pretrained(tmp_path / "out")
    assert len(attached(model)) == found["groups"]


WRONG: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "text": ("images", lambda folder: text_file(folder), "holds no image"),
    "an empty folder": ("images", lambda folder: write_images(folder, 0), "holds no image"),
    "a damaged image": ("images", lambda folder: damaged(write_images(folder, 9)), "cannot be read as an image"),
    "a damaged sound": ("sound", lambda folder: damaged(write_sounds(folder, 9)), "cannot be read as a sound"),
    "another rate": (
        "sound",
        lambda folder: write_sounds(folder, 9, rate=44_100),
        "has 44,100 values a second, and the model reads 16,000",
    ),
    "images for sound": ("sound", lambda folder: write_images(folder, 9), "is not what the model's processor"),
}


def text_file(folder: Path) -> Path:
    folder.mkdir()
    (folder / "text.txt").write_text("text " * 5000)
    return folder


def damaged(folder: Path) -> Path:
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:30])
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_of_something_else_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    kind, make, message = WRONG[case]
    source = processed(kind, tmp_path / "source")
    options = ["--calibration", make(tmp_path / "calibration"), "--base", "nf4", "--output", tmp_path / "out"]
    done = call("correct", source, *options)
    assert done.exit_code == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_is_corrected_while_it_is_loaded(tmp_path: Path) -> None:
    source = processed("images", tmp_path / "source")
    config = glowq.GlowQConfig(base="nf4", calibration=images(16), rank=4, force=True)
    model = getattr(transformers, KINDS["images"][0]).from_pretrained(source, quantization_config=config)
    assert attached(model)
