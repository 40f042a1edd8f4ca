"""Every wrong input raises an error that names it and says what to do, and changes no model and no file."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import glowq
from glowq import errors
from glowq.runtime.attach import attached
from glowq.utils.output import EXPORT_MANIFEST, Kind, check_output
from support.tiny import CALIBRATION, TEXTS, corrected, load, quantized, tiny_llama

RIGHT = "model.layers.0.self_attn.o_proj.right"


@pytest.fixture(scope="module")
def saved(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[glowq.Correction, Path]:
    folder = tmp_path_factory.mktemp("saved")
    model, correction = corrected(source, "nf4")
    correction.save_pretrained(folder / "correction")
    model.save_pretrained(folder / "full")
    return correction, folder


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    """A quantized model. A refused call must not change it."""
    return quantized(source, "nf4")


@pytest.fixture(autouse=True)
def _unchanged(model: Any) -> Any:
    yield
    assert attached(model) == {}
    assert model.config.quantization_config.quant_method == "bitsandbytes"


def correct(model: Any, source: Any, **options: Any) -> Any:
    options = {"calibration": TEXTS, "tokenizer": AutoTokenizer.from_pretrained(model.name_or_path), **options}
    return glowq.correct(model, **{"reference": source, **CALIBRATION, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reference": "/no/such/model"}, errors.ModelNotFoundError, "neither a folder nor a Hub repository"),
        ({"calibration": "no-such-file.txt"}, errors.ModelNotFoundError, "no file or folder"),
        ({"calibration": []}, errors.CalibrationError, "holds no text"),
        ({"calibration": ["", " \n"]}, errors.CalibrationError, "holds no text"),
        ({"calibration": ["x = 1"]}, errors.CalibrationError, "needed 128 tokens for one sequence, found"),
        ({"calibration_tokens": 128, "rank": 65}, errors.CalibrationError, "128 calibration tokens are too few for"),
        ({"calibration": torch.zeros(2, 3)}, errors.CalibrationError, r"whole numbers of shape \(n, length\)"),
        (
            {"calibration": torch.full((4, 64), 4096)},
            errors.TokenizerMismatchError,
            "id 4096, the model knows 0 to 4095",
        ),
        ({"rank": 0}, errors.RankError, "between 1 and 128 for this model, found 0"),
        ({"rank": 129}, errors.RankError, "between 1 and 128 for this model, found 129"),
        ({"budget": "1 percent"}, errors.ConfigError, "neither a share"),
        ({"budget": 10}, errors.ConfigError, "one rank of the smallest group takes"),
        ({"rank": 4, "budget": "1%"}, errors.ConfigError, "either rank or budget"),
        ({"method": "best"}, errors.ConfigError, "method must be one of"),
    ],
)
def test_a_wrong_request(model: Any, source: Path, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        correct(model, source, **options)


def test_a_wrong_reference(model: Any, source: Path, tmp_path: Path) -> None:
    narrow = tiny_llama(tmp_path / "narrow", intermediate_size=192)
    with pytest.raises(errors.ReferenceMismatchError, match=r"\(192, 128\) in the reference and \(256, 128\)"):
        correct(model, narrow)
    unrelated = tiny_llama(tmp_path / "unrelated", seed=1)
    with pytest.raises(errors.ReferenceMismatchError, match=r"the embeddings differ by 1\d\d\.\d%: .* revision"):
        correct(model, unrelated)
    short = tiny_llama(tmp_path / "short", num_hidden_layers=1)
    with pytest.raises(errors.ReferenceMismatchError, match=r"no module 'model\.layers\.1\."):
        correct(model, short)
    model.save_pretrained(tmp_path / "quantized")
    with pytest.raises(errors.UnsupportedModuleError, match="is quantized; the reference must be"):
        correct(model, tmp_path / "quantized")
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.ModelNotFoundError, match=r"checkpoint in .* is incomplete"):
        correct(model, tmp_path / "empty")
    torch.save({}, tmp_path / "empty" / "pytorch_model.bin")
    with pytest.raises(errors.PickleRefusedError, match="a pickle, which can run code"):
        correct(model, tmp_path / "empty")


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    small = quantized(tiny_llama(tmp_path / "small", vocab_size=300), "nf4")
    with pytest.raises(errors.TokenizerMismatchError, match="the model knows 0 to 299"):
        correct(small, tmp_path / "small")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_no_numbers(source: Path, value: float) -> None:
    broken = quantized(source, "nf4")
    with torch.no_grad():
        broken.model.layers[1].post_attention_layernorm.weight[5] = value
    with pytest.raises(errors.NonFiniteError, match=r"model\.layers\.1\.mlp\.gate_proj: its input holds NaN or Inf"):
        correct(broken, source, rank=4)
    assert attached(broken) == {}


@pytest.mark.parametrize("method", ["glowq", "svd"])
def test_an_answer_that_is_no_number(source: Path, method: str) -> None:
    """The last norm is behind every corrected module, so that only the answers show it."""
    broken = quantized(source, "nf4")
    with torch.no_grad():
        broken.model.norm.weight[5] = math.nan
    with pytest.raises(errors.NonFiniteError, match=r"NaN or Inf"):
        correct(broken, source, rank=4, method=method)
    assert attached(broken) == {}


def test_a_model_that_is_not_quantized(source: Path) -> None:
    with pytest.raises(errors.UnsupportedModuleError, match="holds no quantized linear module"):
        correct(load(source), source)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"base": "nf5"}, errors.UnknownBaseError, "unknown base quantizer 'nf5'.* Did you mean 'nf4'"),
        ({"base": {"quant_method": "int1"}}, errors.UnknownBaseError, "int1"),
        ({"rnak": 4}, errors.ConfigError, "unknown field 'rnak' .* Did you mean 'rank'"),
        ({"colour": 4}, errors.ConfigError, "unknown field 'colour' .* Known fields: base, rank"),
        ({"rank": 0}, errors.ConfigError, "rank must be a whole number of at least 1, found 0"),
        ({"seed": "x"}, errors.ConfigError, "seed must be a whole number"),
        ({"rank": 4, "budget": "1%"}, errors.ConfigError, "either rank or budget"),
        ({"correction": "a", "calibration": ["b"]}, errors.ConfigError, "either correction"),
        ({"version": 2}, errors.VersionError, "format version 2; the installed glowq reads up to 1"),
        ({"format": "pickle"}, errors.ConfigError, "format must be one of correction, full"),
        ({"groups": []}, errors.ConfigError, "groups in config.json must be a JSON object, found list"),
        ({"groups": {"a": 1}}, errors.ConfigError, "group 'a' in config.json must be a JSON object"),
        ({"groups": {"a": {}}}, errors.ConfigError, "is missing or unknown"),
    ],
)
def test_a_wrong_configuration(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        glowq.GlowQConfig(**{"base": "nf4", **fields})


def test_a_configuration_that_asks_for_nothing(source: Path) -> None:
    with pytest.raises(errors.ConfigError, match="needs a base quantizer"):
        load(source, quantization_config=glowq.GlowQConfig(calibration=TEXTS))
    with pytest.raises(errors.ConfigError, match="needs calibration text, or the correction to attach"):
        load(source, quantization_config=glowq.GlowQConfig(base="nf4"))


def test_an_output_that_cannot_be_written(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    correction = saved[0]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    shutil.copytree(saved[1] / "correction", tmp_path / "mixed")
    (tmp_path / "mixed" / "thesis.doc").write_text("mine")
    before = snapshot(tmp_path)
    for name, message in (
        ("file", "is a file"),
        ("file/below", "not writable"),
        ("full", "is not empty and holds 'notes.txt'"),
        ("mixed", "is not empty and holds 'thesis.doc'"),
    ):
        with pytest.raises(errors.OutputError, match=message):
            correction.save_pretrained(tmp_path / name)

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    shutil.copytree(saved[1] / "correction", tmp_path / "earlier")
    before |= snapshot(tmp_path)
    for name in ("fresh", "earlier"):
        with pytest.raises(errors.OutputError, match=r"the disk is full\. Nothing was left behind"):
            correction.save_pretrained(tmp_path / name)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "empty", "link"])
@pytest.mark.parametrize("name", ["models", "chat", "tables.jinja", "notes"])
def test_a_folder_within_a_result_is_not_lost(saved: Any, tmp_path: Path, name: str, kind: str) -> None:
    """Saving refuses the output folder whatever the names of the inner folder and its files are."""
    shutil.copytree(saved[1] / "correction", tmp_path / "out")
    if kind == "link":
        (tmp_path / "out" / name).symlink_to(tmp_path, target_is_directory=True)
    else:
        (tmp_path / "out" / name).mkdir()
    if kind == "file":
        (tmp_path / "out" / name / "own.jinja").write_text("mine")
    with pytest.raises(errors.OutputError, match=f"is not empty and holds '{name}"):
        saved[0].save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("listed", [["*"], ["notes.txt", ".."], ["[n]otes.txt"]])
def test_a_manifest_cannot_claim_what_it_does_not_name(tmp_path: Path, listed: list[str]) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / EXPORT_MANIFEST).write_text(json.dumps({"files": dict.fromkeys(listed, 1)}))
    (folder / "notes.txt").write_text("mine")
    (folder / "diary").mkdir()
    with pytest.raises(errors.OutputError, match="is not empty and holds"):
        check_output(folder, kind=Kind.EXPORT)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent(saved: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(errors.OutputError, match="not writable"):
        saved[0].save_pretrained(tmp_path / "out")


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def truncate(folder: Path) -> None:
    data = (folder / "glowq.safetensors").read_bytes()
    (folder / "glowq.safetensors").write_bytes(data[: len(data) - 100])


def tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = load_file(folder / "glowq.safetensors")
        change(found)
        save_file(found, folder / "glowq.safetensors", metadata={"format": "pt"})

    return apply


def stored(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        change(found["quantization_config"])
        (folder / "config.json").write_text(json.dumps(found))

    return apply


def pickled(folder: Path) -> None:
    (folder / "glowq.safetensors").rename(folder / "glowq.bin")


BROKEN: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "garbage": (lambda f: (f / "glowq.safetensors").write_bytes(b"x" * 999), errors.CorrectionError, "corrupt"),
    "truncated": (truncate, errors.CorrectionError, "corrupt or truncated"),
    "empty": (lambda f: (f / "glowq.safetensors").write_bytes(b""), errors.CorrectionError, "corrupt or truncated"),
    "gone": (lambda f: (f / "glowq.safetensors").unlink(), errors.CorrectionError, "glowq.safetensors is missing"),
    "pickle": (pickled, errors.PickleRefusedError, "a pickle, which can run code"),
    "missing": (tensors(lambda t: t.pop(RIGHT)), errors.CorrectionError, f"factor '{RIGHT}' is missing"),
    "extra": (tensors(lambda t: t.update({"a.right": t[RIGHT] + 1})), errors.CorrectionError, "extra factor 'a.right'"),
    "misshaped": (tensors(lambda t: t.update({RIGHT: t[RIGHT][:2]})), errors.CorrectionError, r"shape \(2, 128\)"),
    "whole": (tensors(lambda t: t.update({RIGHT: t[RIGHT].int()})), errors.CorrectionError, "expected BF16 or F16"),
    "nan": (tensors(lambda t: t[RIGHT].fill_(math.nan)), errors.NonFiniteError, f"'{RIGHT}' in .* holds NaN"),
    "field": (stored(lambda c: c.update(sede=1)), errors.ConfigError, "unknown field 'sede' .* 'seed'"),
    "newer": (stored(lambda c: c.update(version=2)), errors.VersionError, "format version 2"),
    "climbing": (stored(lambda c: c["base_model"].update(name="../x")), errors.UnsafePathError, "leads out"),
    "wrong": (stored(lambda c: c["base_model"].update(fingerprint="0")), errors.FingerprintError, "another model"),
}


@pytest.mark.parametrize("damage", BROKEN)
@pytest.mark.parametrize("api", ["from_pretrained", "load_correction"])
def test_a_broken_correction(saved: Any, model: Any, damage: str, api: str, tmp_path: Path) -> None:
    apply, error, message = BROKEN[damage]
    shutil.copytree(saved[1] / "correction", tmp_path / "broken")
    apply(tmp_path / "broken")
    before = snapshot(tmp_path)
    with pytest.raises(error, match=message):
        load(tmp_path / "broken") if api == "from_pretrained" else glowq.load_correction(model, tmp_path / "broken")
    assert snapshot(tmp_path) == before


def test_what_is_no_correction(saved: Any, source: Path, model: Any, tmp_path: Path) -> None:
    for path, message in (
        (source, "names no glowq correction"),
        (saved[1] / "full", "self-contained glowq model"),
        (tmp_path, "config.json does not exist"),
    ):
        with pytest.raises(errors.ModelNotFoundError, match=message):
            glowq.load_correction(model, path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(errors.CorrectionError, match="is not valid JSON"):
        glowq.load_correction(model, tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(errors.CorrectionError, match="holds list, expected a JSON object"):
        glowq.load_correction(model, tmp_path)


def test_a_base_that_is_gone_or_no_base(saved: Any, source: Path, tmp_path: Path) -> None:
    for name, error, message in (
        ("/no/such/base", errors.ModelNotFoundError, "neither a folder nor a Hub repository"),
        (str(saved[1] / "correction"), errors.ConfigError, "is itself a correction"),
    ):
        folder = Path(shutil.copytree(saved[1] / "correction", tmp_path / "broken", dirs_exist_ok=True))
        stored(lambda config, name=name: config["base_model"].update(name=name))(folder)
        with pytest.raises(error, match=message):
            load(folder)


def test_shards_outside_their_folder(saved: Any, source: Path, tmp_path: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../../x/model.safetensors"}}
    (tmp_path / "x").mkdir()
    shutil.copy(source / "model.safetensors", tmp_path / "x")
    for name in ("full", "reference"):
        shutil.copytree(saved[1] / "full" if name == "full" else source, tmp_path / "a" / name)
        (tmp_path / "a" / name / "model.safetensors").unlink()
        (tmp_path / "a" / name / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(errors.UnsafePathError, match="outside its folder"):
        load(tmp_path / "a" / "full")
    with pytest.raises(errors.UnsafePathError, match="points outside its repository"):
        correct(quantized(source, "nf4"), tmp_path / "a" / "reference")


def test_a_full_model_of_pickles(saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved[1] / "full", tmp_path / "full")
    torch.save(load_file(tmp_path / "full" / "model.safetensors"), tmp_path / "full" / "pytorch_model.bin")
    (tmp_path / "full" / "model.safetensors").unlink()
    with pytest.raises(errors.PickleRefusedError, match="a pickle, which can run code"):
        load(tmp_path / "full")
