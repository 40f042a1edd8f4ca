"""Wrong, damaged or incomplete bases: every function and command refuses them by name and says what to do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer
from typer.testing import CliRunner

import glowq
from glowq import errors
from glowq.cli.app import app
from glowq.quantizers.model import prepare_model
from support.bases import Base, rows, small_model
from support.tiny import CALIBRATION, CHEAP, TEXTS, corrected, load, quantized, tiny_llama

pytestmark = pytest.mark.usefixtures("uncompiled")

NAME = "model.layers.0.self_attn.q_proj"
SIZES = ["--rank", 4, "--calibration-tokens", 1024, "--sequence-length", 128]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "notes.txt"
    file.write_text("\n".join(TEXTS))
    return file


@pytest.fixture
def refused(text: Path, tmp_path: Path) -> Callable[..., str]:
    """A function that runs a command, asserts that it fails with status 1 and no output, and returns the error line."""
    options: dict[str, list[Any]] = {
        "correct": ["--calibration", text, "--output", tmp_path / "out", *SIZES],
        "evaluate": ["--data", text, "--tokens", 512, "--sequence-length", 64],
        "inspect": [],
    }

    def run(command: str, *arguments: Any) -> str:
        done = CliRunner().invoke(app, [str(word) for word in (command, *arguments, *options[command])])
        assert done.exit_code == 1, done.output
        lines = [line for line in done.stderr.splitlines() if line.startswith("glowq: error: ")]
        assert len(lines) == 1
        assert done.stderr.rstrip().endswith(lines[0])
        assert not (tmp_path / "out").exists()
        return lines[0]

    return run


def correct(model: Any, reference: Path, folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    options = {"calibration": TEXTS, "tokenizer": tokenizer, "rank": 4, **CHEAP, **CALIBRATION}
    made = glowq.correct(model, reference=reference, **options)
    made.save_pretrained(folder)
    return folder


def save_quantized(source: Path, base: str, folder: Path, **options: Any) -> Path:
    model = quantized(source, base)
    prepare_model(model)
    model.save_pretrained(folder, **options)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("base", rows("nf4"))
def test_a_reference_of_another_model_or_revision(base: Base, source: Path, refused: Any, tmp_path: Path) -> None:
    folder = save_quantized(source, base.name, tmp_path / "nf4")
    narrow = tiny_llama(tmp_path / "narrow", intermediate_size=192)
    assert "(192, 128) in the reference and (256, 128)" in refused("correct", folder, "--reference", narrow)
    unrelated = tiny_llama(tmp_path / "unrelated", seed=1)
    assert re.search(r"the embeddings differ by .*revision", refused("correct", folder, "--reference", unrelated))


@pytest.mark.parametrize("base", rows("nf4"))
def test_a_base_quantized_again_with_other_settings(base: Base, source: Path, refused: Any, tmp_path: Path) -> None:
    folder = save_quantized(source, base.name, tmp_path / "base")
    correction = correct(load(folder), source, tmp_path / "corr")
    load(correction)
    shutil.rmtree(folder)
    save_quantized(source, "nf4-double", folder)
    with pytest.raises(errors.FingerprintError, match="other quantization settings"):
        load(correction)
    assert "other quantization settings" in refused("evaluate", source, correction)


@pytest.mark.parametrize("base", rows("gptqmodel-int4-act-order"))
def test_a_permuted_column_order(base: Base, refused: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base.checkpoint(small_model()), tmp_path / "base"))
    correction = correct(load(folder), small_model(), tmp_path / "corr")
    change(folder, "g_idx", lambda order: order.flip(0))
    with pytest.raises(errors.FingerprintError, match="was made for quantized weights"):
        load(correction)
    assert "was made for quantized weights" in refused("evaluate", small_model(), correction)


@pytest.mark.parametrize("base", rows("nf4"))
def test_a_missing_shard(base: Base, source: Path, refused: Any, tmp_path: Path) -> None:
    folder = save_quantized(source, base.name, tmp_path / "base", max_shard_size="300KB")
    correction = correct(load(folder), source, tmp_path / "corr")
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(errors.ModelNotFoundError, match=rf"{lost.name} is missing: the checkpoint in .* is incomplete"):
        load(correction)
    for command in (["evaluate", source, correction], ["inspect", folder], ["correct", folder, "--reference", source]):
        assert lost.name in refused(*command), command


@pytest.mark.parametrize("base", rows("nf4"))
def test_a_missing_shard_of_the_reference(base: Base, source: Path, refused: Any, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    load(source).save_pretrained(reference, max_shard_size="300KB")
    AutoTokenizer.from_pretrained(source).save_pretrained(reference)
    lost = sorted(reference.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(errors.ModelNotFoundError, match=f"{lost.name} is missing"):
        correct(quantized(source, base.name), reference, tmp_path / "corr")
    folder = save_quantized(source, base.name, tmp_path / "base")
    assert lost.name in refused("correct", folder, "--reference", reference)


def change(folder: Path, tensor: str, edit: Callable[[Tensor], Tensor]) -> None:
    """Change one tensor of one module in a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{NAME}.{tensor}"] = edit(tensors[f"{NAME}.{tensor}"].clone()).contiguous()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, folder / "model.safetensors", metadata=metadata)


@cache
def _saved(name: str, parent: Path) -> Path:
    return save_quantized(small_model(), name, parent / name)


def pristine(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _saved(base.name, tmp_path_factory.getbasetemp()) if base.is_preset else base.checkpoint(small_model())


SCALES = {
    "nf4": "weight.absmax",
    "nf4-double": "weight.nested_absmax",
    "int8": "SCB",
    "torchao-int8": "_weight_scale",
    "torchao-int4": "_weight_scale",
    "gptqmodel-int4-act-order": "scales",
    "awq-int4": "scales",
    "w4a16": "weight_scale",
    "w8a16-channels": "weight_scale",
}


# No zero scales for bitsandbytes: it writes them itself for blocks of zeros.
@pytest.mark.parametrize(
    ("base", "value"),
    [
        pytest.param(*row.values, value, id=f"{row.id}-{value}", marks=row.marks)
        for row in rows(*SCALES)
        for value in (0.0, float("inf"), float("nan"))
        if value != 0.0 or row.values[0].package != "bitsandbytes"
    ],
)
def test_damaged_scales(
    base: Base, value: float, refused: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(shutil.copytree(pristine(base, tmp_path_factory), tmp_path / "damaged"))

    def damage(scales: Tensor) -> Tensor:
        scales.view(-1)[1] = value
        return scales

    change(folder, SCALES[base.name], damage)
    if not (folder / "tokenizer.json").is_file():
        AutoTokenizer.from_pretrained(small_model()).save_pretrained(folder)
    line = refused("correct", folder, "--reference", small_model())
    assert re.search(rf"{re.escape(NAME)}: .*quantization scales (are zero|hold NaN or Inf)", line), line


@pytest.mark.parametrize("base", rows("nf4", "torchao-int4", "gptqmodel-int4-act-order", "awq-int4", "w4a16"))
def test_scales_damaged_after_the_correction_was_made(
    base: Base, refused: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(shutil.copytree(pristine(base, tmp_path_factory), tmp_path / "base"))
    correction = correct(load(folder), small_model(), tmp_path / "corr")
    change(folder, SCALES[base.name], lambda scales: scales.index_fill_(0, torch.tensor([0]), float("nan")))
    message = rf"{re.escape(NAME)}: its quantization scales hold NaN or Inf"
    with pytest.raises(errors.NonFiniteError, match=message):
        load(correction)
    with pytest.raises(errors.NonFiniteError, match=message):
        glowq.load_correction(load(folder), correction)
    assert re.search(message, refused("evaluate", small_model(), correction))
    assert folder.name in refused("evaluate", small_model(), folder)


@pytest.mark.parametrize("base", rows("hqq-4", "quanto-int4", "quanto-int8"))
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=["inf", "nan"])
def test_damaged_scales_of_models_in_memory(base: Base, value: float, tmp_path: Path) -> None:
    model = base.load()
    backend = prepare_model(model)[NAME]
    with torch.inference_mode():
        backend.scales(model.get_submodule(NAME))[0].view(-1)[1] = value
    with pytest.raises(errors.NonFiniteError, match=rf"{re.escape(NAME)}: its quantization scales hold NaN or Inf"):
        correct(model, small_model(), tmp_path)


@pytest.mark.parametrize("base", rows("quanto-int4", "hqq-4"))
def test_a_base_that_cannot_be_saved_does_not_keep_an_adapter_from_being_saved(
    base: Base, source: Path, tmp_path: Path
) -> None:
    lora = pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj"])
    model, _ = corrected(source, base.name)
    with pytest.raises(errors.ConfigError, match="cannot be saved in one piece"):
        model.save_pretrained(tmp_path / "full")
    assert not (tmp_path / "full").exists()
    plain = quantized(source, base.name)
    for name, each in (("plain", plain), ("ours", model)):
        torch.manual_seed(0)
        each.add_adapter(lora)
        each.save_pretrained(tmp_path / name)
    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "ours")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


@pytest.mark.parametrize("base", rows("hqq-4"))
def test_nor_does_one_that_its_own_library_quantized(base: Base, tmp_path: Path) -> None:
    lora = pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj"])
    model = base.load()
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    glowq.correct(model, reference=small_model(), calibration=TEXTS, tokenizer=tokenizer, rank=4, **CALIBRATION)
    with pytest.raises(errors.ConfigError, match="quantized by its own library"):
        model.save_pretrained(tmp_path / "full")
    model.add_adapter(lora)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
