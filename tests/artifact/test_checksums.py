"""A factor that is not what was saved is refused, in both forms of a saved model."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

import glowq
from glowq.artifact.correction import Correction
from glowq.errors import CorrectionError, NonFiniteError
from support.cli import call
from support.tiny import corrected, gap, load, logits

Change = Callable[[dict[str, Tensor]], Any]


@pytest.fixture(scope="module", params=["auto", "int8"])
def saved(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with correction/ and full/, with factors of the model's dtype, or of int8."""
    folder = tmp_path_factory.mktemp("saved")
    model, correction = corrected(source, "nf4", factor_dtype=request.param, rank=6)
    correction.save_pretrained(folder / "correction")
    model.save_pretrained(folder / "full")
    return folder


def file_of(folder: Path, form: str) -> Path:
    return folder / form / ("glowq.safetensors" if form == "correction" else "model.safetensors")


def changed(saved: Path, form: str, folder: Path, change: Change) -> Path:
    """Copy a form, with changed tensors and the metadata as they were."""
    target = folder / form
    target.mkdir()
    for file in (saved / form).iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    file = file_of(folder, form)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)
    return target


def factors_of(tensors: dict[str, Tensor], end: str) -> list[str]:
    return sorted(name for name in tensors if name.endswith(end))


def swap(tensors: dict[str, Tensor]) -> None:
    first, second = (f"model.layers.{block}.mlp.down_proj.left" for block in (0, 1))
    tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()


CHANGES: dict[str, Change] = {
    "times 2": lambda t: [t[name].mul_(2) for name in factors_of(t, ".left")],
    "one value": lambda t: t[factors_of(t, ".right")[0]][0].neg_(),
    "swapped between blocks": swap,
    "zero": lambda t: t[factors_of(t, ".left")[1]].zero_(),
}


@pytest.mark.parametrize("form", ["correction", "full"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_factor_is_refused(saved: Path, form: str, change: Change, tmp_path: Path) -> None:
    folder = changed(saved, form, tmp_path, change)
    with pytest.raises(CorrectionError, match=r"is not what was saved: its checksum differs"):
        load(folder)
    assert "checksum differs" in call("verify", folder).stderr


def test_every_flipped_bit_is_found(saved: Path, tmp_path: Path) -> None:
    folder = changed(saved, "correction", tmp_path, lambda tensors: None)
    file = file_of(tmp_path, "correction")
    whole = file.read_bytes()
    start, draw = 8 + int.from_bytes(whole[:8], "little"), random.Random(0)
    for _ in range(60):
        place, bit = draw.randrange(start, len(whole)), draw.randrange(8)
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
        with pytest.raises((CorrectionError, NonFiniteError)):
            Correction.from_pretrained(folder)
    file.write_bytes(whole)
    Correction.from_pretrained(folder)


@pytest.mark.parametrize("text", ["no json", "[1]", '{"a": 1}', "[" * 100_000])
def test_checksums_that_cannot_be_read_are_refused(saved: Path, text: str, tmp_path: Path) -> None:
    folder = changed(saved, "correction", tmp_path, lambda tensors: None)
    file = file_of(tmp_path, "correction")
    file.write_bytes(save(load_file(file), metadata={"format": "pt", "glowq_sha256": text}))
    with pytest.raises(CorrectionError, match="checksums that cannot be read"):
        Correction.from_pretrained(folder)


def test_files_of_older_versions_hold_no_checksums_and_load(saved: Path, tmp_path: Path) -> None:
    folder = changed(saved, "correction", tmp_path, lambda tensors: None)
    file = file_of(tmp_path, "correction")
    file.write_bytes(save(load_file(file), metadata={"format": "pt"}))
    assert gap(load(folder), logits(load(saved / "correction"))) == 0.0


def test_a_saved_model_loaded_and_saved_again_has_the_same_checksums(saved: Path, tmp_path: Path) -> None:
    load(saved / "full").save_pretrained(tmp_path / "again")
    again = glowq.Correction.from_pretrained(saved / "correction")
    again.save_pretrained(tmp_path / "correction")
    for form, folder in (("full", tmp_path / "again"), ("correction", tmp_path / "correction")):
        with (
            safe_open(file_of(saved, form), "pt") as before,
            safe_open(folder / file_of(saved, form).name, "pt") as after,
        ):
            assert before.metadata()["glowq_sha256"] == after.metadata()["glowq_sha256"]
