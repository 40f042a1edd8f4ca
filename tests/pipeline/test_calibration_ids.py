"""Token ids as calibration, through the functions that users call: what is read, what is refused before the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

import glowq
from glowq.artifact.request import CorrectionRequest
from glowq.calibration.output_gradients import output_moments
from glowq.calibration.text_gap import text_gap
from glowq.errors import CalibrationError, GlowQError, TokenizerMismatchError
from glowq.models.loading import load_config, token_limits
from glowq.models.positions import position_limit
from glowq.pipeline.compare.comparison import compare_methods
from support.cli import result_of
from support.tiny import CALIBRATION, CHEAP, EXAMPLE, SHAPE, TEXTS, load, quantized, seeded

IDS = torch.randint(5, 4096, (16, 24), generator=torch.Generator().manual_seed(0))
POSITIONS = 34  # of RoBERTa, which reserves two of them
MEASURING: dict[str, Any] = {"method": "glowq-one-sided", "rank": 4, "force": True}  # uses the input moments


def padded(side: str) -> BatchEncoding:
    """The same 16 sequences, each with eight tokens of padding that hold the largest id."""
    filler = torch.full((16, 8), 4095)
    parts = [IDS, filler] if side == "right" else [filler, IDS]
    masks = [torch.ones_like(IDS), torch.zeros_like(filler)]
    return BatchEncoding(
        {"input_ids": torch.cat(parts, 1), "attention_mask": torch.cat(masks if side == "right" else masks[::-1], 1)}
    )


FORMS: dict[str, Any] = {
    **{str(kind): IDS.to(kind) for kind in (torch.int16, torch.int32)},
    "array": IDS.numpy().astype(np.uint16),
    "dict": {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
    "dict without a mask": {"input_ids": IDS},
    "lists": BatchEncoding({"input_ids": IDS.tolist(), "token_type_ids": [[0] * 24] * 16}),
    "arrays": BatchEncoding({"input_ids": IDS.numpy(), "attention_mask": np.ones((16, 24), bool)}),
    "tensors": {"input_ids": list(IDS)},
    "data set": Dataset.from_dict({"input_ids": IDS.tolist(), "attention_mask": [[1] * 24] * 16}),
    "padded on the right": padded("right"),
    "padded on the left": padded("left"),
}


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    return quantized(source, "nf4")


def solved(model: Any, source: Any, calibration: Any, **options: Any) -> dict[str, Tensor]:
    correction = glowq.correct(model, reference=source, calibration=calibration, **{**MEASURING, **options})
    glowq.detach(model)
    return correction.tensors()


@pytest.fixture(scope="module")
def expected(model: Any, source: Path) -> dict[str, Tensor]:
    return solved(model, source, IDS)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_calibrates_alike(form: str, model: Any, source: Path, expected: dict[str, Tensor]) -> None:
    found = solved(model, source, FORMS[form])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_ids_of_one_byte(model: Any, source: Path) -> None:
    found, wanted = (solved(model, source, (IDS % 251).to(kind)) for kind in (torch.uint8, torch.int64))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_sequences_of_different_lengths_are_joined(model: Any, source: Path) -> None:
    rows = [row[: 12 + index % 13].tolist() for index, row in enumerate(IDS)]
    stream = torch.tensor([token for row in rows for token in row])
    length = stream.numel() // -(-stream.numel() // 24)
    wanted = stream[: stream.numel() // length * length].view(-1, length)
    assert stream.numel() - wanted.numel() < len(wanted)
    found, same = solved(model, source, {"input_ids": rows}), solved(model, source, wanted)
    assert all(torch.equal(found[name], tensor) for name, tensor in same.items())


def test_a_tokenizers_result_while_loading(source: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(TEXTS[:2], padding=True, truncation=True, max_length=256, return_tensors="pt")
    config = glowq.GlowQConfig(base="nf4", calibration=encoded, rank=2, **CHEAP)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    provenance = model.config.quantization_config.provenance
    assert provenance.calibration_tokens <= int(encoded["attention_mask"].sum())
    assert provenance.sequence_length <= encoded["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (DatasetDict(train=Dataset.from_dict({"text": TEXTS})), r"of the splits 'train'; .* data\['train'\]"),
        ({"text": TEXTS}, r"dict with the keys 'text'"),
        (5, r"expected text, found int"),
        ("notes-that-are-not-there.txt", r"no file or folder 'notes-that-are-not-there.txt'"),
    ],
    ids=["splits", "dict", "number", "missing"],
)
def test_what_is_refused_before_a_model_is_loaded(
    given: Any, message: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **options: Any) -> Any:
        raise AssertionError("weights are read")

    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel._load_pretrained_model", load)
    config = glowq.GlowQConfig(base="nf4", calibration=given, rank=2)
    with pytest.raises(GlowQError, match=message):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config)


def at(place: tuple[int, int], value: int) -> Tensor:
    changed = IDS.clone()
    changed[place] = value
    return changed


MASK = torch.ones_like(IDS)
REFUSED: dict[str, tuple[Any, str]] = {
    "labels": (at((3, 4), -100), r"hold id -100, and ids are never negative; .*not labels"),
    "labels in a dict": ({"input_ids": at((3, 4), -100)}, r"hold id -100"),
    "another vocabulary": (at((3, 4), 4096), r"hold id 4096, the model knows 0 to 4095"),
    "one sequence too long": (IDS.reshape(1, -1).repeat(1, 2), r"has 768 tokens, and the model has positions for 512"),
    "bool": (IDS > 9, r"whole numbers of shape \(n, length\), .* found torch.bool of shape \(16, 24\)"),
    "float": (IDS.double(), r"found torch.float64"),
    "complex": (IDS.to(torch.complex64), r"found torch.complex64"),
    "float lists": ({"input_ids": [[1.0, 2.0]]}, r"input_ids must be whole numbers .* found torch.float32"),
    "texts": ({"input_ids": ["a", "b"]}, r"input_ids must be whole numbers"),
    "a number": ({"input_ids": 5}, r"input_ids must be whole numbers"),
    "three dimensions": (IDS[None], r"found torch.int64 of shape \(1, 16, 24\)"),
    "nested lists": ({"input_ids": [[[1, 2]]]}, r"a sequence of shape \(1, 2\)"),
    "no ids": ({"input_ids": []}, r"hold no token"),
    "an empty tensor": (IDS[:0], r"hold no token"),
    "padding alone": ({"input_ids": IDS, "attention_mask": 0 * MASK}, r"hold no token"),
    "a mask of another shape": ({"input_ids": IDS, "attention_mask": MASK[:, 1:]}, r"one number for each of input_ids"),
    "a mask to add": ({"input_ids": IDS, "attention_mask": MASK - 2}, r"1 for a token and 0 for padding"),
    "a dict of texts": ({"text": TEXTS}, r"dict with the keys 'text', .* data\[\"text\"\]"),
    "splits": (DatasetDict(train=Dataset.from_dict({"text": TEXTS})), r"of the splits 'train'; .* data\['train'\]"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_before_the_work(
    kind: str, model: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, message = REFUSED[kind]

    def work(*args: Any, **options: Any) -> Any:
        raise AssertionError("the work has begun")

    monkeypatch.setattr("glowq.pipeline.prepared.trace_groups", work)
    with pytest.raises((CalibrationError, TokenizerMismatchError), match=message):
        solved(model, source, given)


@pytest.mark.parametrize("kind", ["labels", "another vocabulary", "one sequence too long", "bool"])
def test_a_comparison_refuses_the_same(kind: str, model: Any, source: Path) -> None:
    given, message = REFUSED[kind]
    with pytest.raises(GlowQError, match=message):
        compare_methods(model, reference=source, calibration=given, methods=["svd"], budgets=["9%"])


def reserving(folder: Path, kind: str) -> Path:
    """Save a model whose table of positions has rows that no token takes, with the bundled tokenizer."""
    narrow = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 4096}
    with seeded(0):
        if kind == "roberta":
            shape = {**narrow, "intermediate_size": 64, "max_position_embeddings": POSITIONS, "pad_token_id": 1}
            made: Any = RobertaForCausalLM(RobertaConfig(is_decoder=True, **shape))
        else:
            shape = {**narrow, "ffn_dim": 64, "word_embed_proj_dim": 64, "max_position_embeddings": POSITIONS - 2}
            made = OPTForCausalLM(OPTConfig(**shape))
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EXAMPLE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["roberta", "opt"])
def reserved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reserving(tmp_path_factory.mktemp("reserving") / request.param, request.param)


def test_positions_that_no_token_takes(reserved: Path, tmp_path: Path) -> None:
    """RoBERTa's 34 positions are enough for 32 tokens; OPT says 32 and has a table of 34."""
    plain, config = load(reserved), load_config(str(reserved))
    assert position_limit(plain) == POSITIONS - 2
    assert token_limits(config, 512) == (POSITIONS - 2, 4096)
    assert token_limits(config, 20) == (20, 4096)
    model = quantized(reserved, "nf4")
    fits = IDS.reshape(12, 32)
    assert solved(model, reserved, fits, rank=2)
    with pytest.raises(CalibrationError, match="has 48 tokens, and the model has positions for 32"):
        solved(model, reserved, IDS.reshape(8, 48), rank=2)
    tokenizer = AutoTokenizer.from_pretrained(reserved)
    assert solved(model, reserved, TEXTS, rank=2, tokenizer=tokenizer, calibration_tokens=640)


def test_commands_cut_text_to_the_positions(reserved: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.JSONL").write_text("".join(f'{{"text": "{word} = 1"}}\n' for word in ("a", "b", "c") * 400))
    found = result_of("evaluate", reserved, reserved, "--data", tmp_path / "notes.JSONL", "--tokens", 256)
    assert found["data_tokens"] == 256
    assert found["pairs"][0]["ppl_ratio"] == 1.0


def test_the_limits_of_other_models_build_none(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    def build(*args: Any) -> Any:
        raise AssertionError("a model was built")

    monkeypatch.setattr("glowq.models.positions.limit_of_config", build)
    assert token_limits(load_config(str(source)), 128) == (128, SHAPE["vocab_size"])


@pytest.mark.parametrize("door", ["command", "loading"])
def test_a_calibrated_base_does_not_see_the_text_that_is_measured_on(
    door: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncompiled: None
) -> None:
    pytest.importorskip("gptqmodel")
    from glowq.integrations.transformers import checkpoint, quantizer
    from glowq.pipeline import finish

    seen: dict[str, Tensor] = {}
    module = checkpoint if door == "command" else quantizer
    quantize, measure = module.with_calibration, finish.measure_groups

    def with_calibration(config: Any, sequences: Tensor) -> Any:
        seen["base"] = sequences
        return quantize(config, sequences)

    def measure_groups(model: Any, reference: Any, factors: Any, sequences: Tensor) -> Any:
        seen["measured"] = sequences
        return measure(model, reference, factors, sequences)

    monkeypatch.setattr(module, "with_calibration", with_calibration)
    monkeypatch.setattr(finish, "measure_groups", measure_groups)
    options: dict[str, Any] = {"budget": "20%", "calibration": TEXTS, **CALIBRATION, "force": True}
    if door == "command":
        request = CorrectionRequest(**options)
        checkpoint.correct_checkpoint(str(source), tmp_path / "out", request=request, base="gptq-4", format="full")
    else:
        load(source, quantization_config=glowq.GlowQConfig(base="gptq-4", **options))
    rows = {tuple(row) for row in seen["base"].tolist()}
    assert rows
    assert not rows & {tuple(row) for row in seen["measured"].tolist()}


def in_order(length: int, count: int) -> Tensor:
    """Sequences of one kind of text, followed by as many of another."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(5, 15, (count, length), generator=generator)
    return torch.cat([first, torch.randint(2000, 2010, (count, length), generator=generator)])


class TestTextInAnOrder:
    def test_gradients_are_of_all_its_kinds(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Tensor] = []

        def watched(model: Any, groups: Any, inputs: Any, **options: Any) -> Any:
            seen.extend(batch["input_ids"] for batch in inputs)
            return output_moments(model, groups, inputs, **options)

        monkeypatch.setattr("glowq.pipeline.problem._GRADIENT_TOKENS", 4 * 24)
        monkeypatch.setattr("glowq.pipeline.problem.output_moments", watched)
        glowq.correct(
            quantized(source, "torchao-int4"), reference=source, calibration=in_order(24, 8), rank=2, force=True
        )
        firsts = torch.cat(seen)[:, 0]
        assert len(firsts) == 4
        assert int((firsts < 1000).sum()) == 2

    def test_both_halves_that_are_compared_hold_all_its_kinds(
        self, source: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        far: list[float] = []

        def watched(error: Any, first: Any, whole: Any, *rest: Any) -> Any:
            far.append(float((first.second - whole.second).norm() / whole.second.norm()))
            return text_gap(error, first, whole, *rest)

        monkeypatch.setattr("glowq.pipeline.block_solver.text_gap", watched)
        ids = in_order(128, 64)
        glowq.correct(quantized(source, "torchao-int4"), reference=source, calibration=ids, rank=2, force=True)
        assert far
        assert max(far) < 0.1
