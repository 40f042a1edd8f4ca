"""Dense weights that were dequantized on load or rounded without packing: glowq corrects them with `dense=True`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

import glowq
from glowq.cli.app import app
from glowq.errors import ConfigError, FingerprintError, ReferenceMismatchError, UnsupportedModuleError
from glowq.quantizers.loading.dense import adopt_dense, mark_dense
from glowq.quantizers.model import prepare_model, quantized_modules, read_weight
from glowq.quantizers.registry import find_backend
from support import writers
from support.bases import rows, small_model
from support.tiny import CALIBRATION, TEXTS, gap, load, logits, seeded

pytestmark = pytest.mark.usefixtures("uncompiled")

NAME = "model.layers.1.mlp.up_proj"
FILE = "model-Q4_0.gguf"


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Round a weight to the nearest of 4-bit values, with one scale per row."""
    scale = weight.float().abs().amax(1, keepdim=True) / 7
    return ((weight.float() / scale).round() * scale).to(weight.dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with three kinds of the same model: gguf/, float8/ and fake/."""
    parent = tmp_path_factory.mktemp("dense")
    (parent / "gguf").mkdir()
    pytest.importorskip("gguf")
    writers.gguf(small_model(), parent / "gguf" / FILE, "Q4_0")
    writers.float8(small_model(), parent / "float8")
    model = load(small_model())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = rounded(module.weight.data)
    model.save_pretrained(parent / "fake")
    AutoTokenizer.from_pretrained(small_model()).save_pretrained(parent / "fake")
    return parent


def opened(folder: Path, kind: str, **options: Any) -> Any:
    return load(folder / kind, **({"gguf_file": FILE} if kind == "gguf" else {}), **options)


def correct(model: Any, **options: Any) -> glowq.Correction:
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    settings = {"reference": small_model(), "rank": 8, "dense": True, **options}
    return glowq.correct(model, calibration=TEXTS, tokenizer=tokenizer, **CALIBRATION, **settings)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gguf", r"its gguf weights were dequantized on load\. Pass dense=True \(--base dense\)"),
        ("float8", r"its fp8 weights were dequantized on load\. Pass dense=True"),
        ("fake", r"nothing to correct\. Quantize it first.*pass dense=True"),
    ],
)
def test_without_being_asked_it_refuses_and_says_what_it_found(folder: Path, kind: str, message: str) -> None:
    model = opened(folder, kind)
    with pytest.raises(UnsupportedModuleError, match=message):
        correct(model, dense=False)
    assert quantized_modules(model) == {}


@pytest.mark.parametrize("kind", ["gguf", "float8", "fake"])
def test_it_is_corrected_saved_and_loaded_exactly(folder: Path, kind: str, tmp_path: Path) -> None:
    model = opened(folder, kind)
    untouched, reference = logits(model), logits(load(small_model(), dtype=model.dtype))
    correction = correct(model)
    expected = logits(model)
    assert float((expected - reference).norm()) < 0.95 * float((untouched - reference).norm())
    correction.save_pretrained(tmp_path / "correction")
    again = opened(folder, kind)
    glowq.load_correction(again, tmp_path / "correction")
    assert gap(again, expected) == 0.0
    model.save_pretrained(tmp_path / "full")
    loaded = load(tmp_path / "full")
    assert gap(loaded, expected) == 0.0
    loaded.save_pretrained(tmp_path / "again")
    assert gap(load(tmp_path / "again"), expected) == 0.0
    stored = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["base"]) == ("glowq", {"quant_method": "dense"})
    glowq.detach(loaded)
    assert gap(loaded, untouched) == 0.0
    loaded.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert gap(load(tmp_path / "plain"), untouched) == 0.0


def test_the_correction_of_a_plain_folder_loads_by_itself(folder: Path, tmp_path: Path) -> None:
    model = opened(folder, "fake")
    correct(model).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert gap(loaded, logits(model)) == 0.0
    loaded.save_pretrained(tmp_path / "full")
    assert gap(load(tmp_path / "full"), logits(model)) == 0.0


@pytest.mark.parametrize("kind", ["gguf", "float8"])
def test_the_correction_of_what_was_dequantized_says_how_it_is_loaded(folder: Path, kind: str, tmp_path: Path) -> None:
    correct(opened(folder, kind)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"gguf_file or dequantize=True\) and call glowq\.load_correction"):
        load(tmp_path)


def test_a_gguf_weight_reads_as_the_gguf_library_dequantizes_it(folder: Path) -> None:
    from gguf import GGUFReader, quants

    model = opened(folder, "gguf")
    adopt_dense(model)
    tensors = {tensor.name: tensor for tensor in GGUFReader(folder / "gguf" / FILE).tensors}
    stored = tensors["blk.1.ffn_up.weight"]
    module = model.get_submodule(NAME)
    expected = torch.from_numpy(quants.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(read_weight(find_backend(module), NAME, module), expected)
    # The file stores the rows of q and k in another order; transformers restores it.
    reference = load(small_model(), dtype=torch.float32)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"):
        weight, full = model.get_submodule(name).weight.detach(), reference.get_submodule(name).weight.detach()
        assert float((weight - full).norm() / full.norm()) < 0.1


def test_the_head_is_left_alone_and_so_is_a_model_that_was_not_marked(folder: Path) -> None:
    model = opened(folder, "fake")
    assert prepare_model(model) == {}
    mark_dense(model)
    found = prepare_model(model)
    assert len(found) == 14
    assert "lm_head" not in found
    assert str(found[NAME].scheme(model.get_submodule(NAME))) == "dense bfloat16"
    assert found[NAME].packed_bytes(model.get_submodule(NAME)) == 768 * 256 * 2


def test_another_dtype_is_another_base(folder: Path, tmp_path: Path) -> None:
    correct(opened(folder, "fake")).save_pretrained(tmp_path)
    with pytest.raises(FingerprintError, match="another dtype"):
        glowq.load_correction(opened(folder, "fake", dtype=torch.float32), tmp_path)
    with pytest.raises(FingerprintError):
        glowq.load_correction(opened(folder, "float8"), tmp_path)


@pytest.mark.parametrize("base", rows("nf4"))
def test_weights_that_stay_quantized_are_not_dense(base: Any) -> None:
    message = r"quantized modules \(model\.layers\.0.*bitsandbytes-4bit\), not dense weights: leave out dense=True"
    with pytest.raises(ConfigError, match=message):
        correct(base.load())


def test_modules_without_error_need_no_correction(folder: Path) -> None:
    model, reference = opened(folder, "fake"), load(small_model())
    model.model.layers[0] = reference.model.layers[0]
    before = logits(model)
    correction = correct(model)
    assert torch.isfinite(logits(model)).all()
    assert gap(model, before) > 0.0
    for entry in correction.factors:
        if "layers.0" in entry.group.name:
            assert all(not left.any() for left in entry.lefts.values())


def test_an_unrelated_reference_is_refused(folder: Path, tmp_path: Path) -> None:
    unrelated = load(small_model())
    with seeded(0):
        unrelated.model.embed_tokens.weight.data.normal_(std=0.02)
    unrelated.save_pretrained(tmp_path)
    with pytest.raises(ReferenceMismatchError, match="embeddings differ"):
        correct(opened(folder, "fake"), reference=tmp_path)


def test_gpt2_and_its_transposed_weights(tmp_path: Path) -> None:
    config = GPT2Config(
        n_layer=2, n_embd=64, n_head=2, n_positions=256, vocab_size=4096, bos_token_id=0, eos_token_id=0
    )
    with seeded(0):
        full = GPT2LMHeadModel(config)
    full.save_pretrained(tmp_path / "full")
    for module in full.modules():
        if isinstance(module, Conv1D):
            module.weight.data = rounded(module.weight.data.T).T.contiguous()
    full.save_pretrained(tmp_path / "rounded")
    model, reference = load(tmp_path / "rounded"), load(tmp_path / "full")
    wanted, before = logits(reference), logits(model)
    correction = correct(model, reference=tmp_path / "full", rank=16)
    module = model.transformer.h[0].mlp.c_fc
    backend = find_backend(module)
    assert backend.features(module) == (256, 64)
    x = torch.eye(64)
    with torch.no_grad(), glowq.disabled(model):
        weight = read_weight(backend, "c_fc", module)
        assert torch.allclose(module(x) - module.bias, weight.T, atol=1e-6)
    assert float((logits(model) - wanted).norm()) < 0.8 * float((before - wanted).norm())
    correction.save_pretrained(tmp_path / "correction")
    assert gap(load(tmp_path / "correction"), logits(model)) == 0.0


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "notes.txt"
    file.write_text("\n".join(TEXTS))
    return file


def test_the_command_corrects_a_gguf_file(folder: Path, text: Path, tmp_path: Path) -> None:
    command = ["correct", folder / "gguf", "--gguf-file", FILE, "--base", "dense", "--reference", small_model()]
    command += ["--calibration", text, "--rank", 4, "--calibration-tokens", 1024, "--sequence-length", 128]
    found = run(*command, "--output", tmp_path / "full", "--format", "full")
    assert found.exit_code == 0, found.output
    assert torch.isfinite(logits(load(tmp_path / "full"))).all()
    found = run(*command, "--output", tmp_path / "correction")
    assert found.exit_code == 0, found.output
    model = opened(folder, "gguf")
    glowq.load_correction(model, tmp_path / "correction")
    assert gap(load(tmp_path / "full"), logits(model)) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gguf"], "--gguf-file model-Q4_0.gguf, --base dense, and --reference"),
        ([f"gguf/{FILE}"], "as MODEL, --gguf-file model-Q4_0.gguf, --base dense"),
        (["fake"], "or say --base dense"),
        (["fake", "--base", "dense"], "give --reference"),
        (
            ["float8", "--reference", "REFERENCE"],
            "its fp8 weights were dequantized on load. Pass dense=True (--base dense)",
        ),
    ],
)
def test_the_command_says_what_is_missing(
    folder: Path, text: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    model, *rest = [str(small_model()) if argument == "REFERENCE" else argument for argument in arguments]
    shutil.copytree(folder / "fake", tmp_path / "fake")
    found = run("correct", folder / model, "--calibration", text, "--output", tmp_path / "out", *rest)
    assert found.exit_code == 1
    assert message in found.output
    assert not (tmp_path / "out").exists()
