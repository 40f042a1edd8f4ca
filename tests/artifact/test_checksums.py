"""A factor that is not what was saved is refused, in both forms of a saved model."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from glowq.artifact.correction import Correction
from glowq.artifact.factor_layout import FACTOR_KEYS
from glowq.errors import ConfigError, CorrectionError, NonFiniteError
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


def stored_groups(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]["groups"]
    return found


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change every group in config.json."""
    config = json.loads((folder / "config.json").read_text())
    for group in config["quantization_config"]["groups"].values():
        change(group)
    (folder / "config.json").write_text(json.dumps(config))


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


@pytest.mark.parametrize("form", ["correction", "full"])
def test_members_exchanged_between_groups_are_refused(saved: Path, form: str, tmp_path: Path) -> None:
    """Every factor is the one that was saved, and would correct another module of the same shape."""
    folder = changed(saved, form, tmp_path, lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["groups"]
    first, second = (groups[f"model.layers.{block}.mlp.down_proj"] for block in (0, 1))
    first["members"], second["members"] = second["members"], first["members"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"0\.mlp\.down_proj' .* has the members of the group '.*1\.mlp\.down_proj'"):
        load(folder)
    assert "has the members of the group" in call("verify", folder).stderr


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


@pytest.mark.parametrize("digests", ["text", ["a"], {"a": 1}, 7], ids=str)
def test_checksums_of_another_type_are_refused(saved: Path, digests: Any, tmp_path: Path) -> None:
    folder = changed(saved, "correction", tmp_path, lambda tensors: None)
    edit(folder, lambda group: group.update(sha256=digests))
    with pytest.raises(ConfigError, match="must hold one text for each factor"):
        Correction.from_pretrained(folder)


def test_corrections_of_older_versions_hold_no_checksums_and_load(saved: Path, tmp_path: Path) -> None:
    folder = changed(saved, "correction", tmp_path, lambda tensors: None)
    edit(folder, lambda group: group.pop("sha256"))
    assert gap(load(folder), logits(load(saved / "correction"))) == 0.0


@pytest.mark.parametrize("form", ["correction", "full"])
def test_what_is_loaded_and_saved_again_has_the_same_checksums(saved: Path, form: str, tmp_path: Path) -> None:
    if form == "full":
        load(saved / form).save_pretrained(tmp_path / form)
    else:
        Correction.from_pretrained(saved / form).save_pretrained(tmp_path / form)
    before, after = (stored_groups(folder / form) for folder in (saved, tmp_path))
    assert {name: group["sha256"] for name, group in before.items()} == {n: g["sha256"] for n, g in after.items()}
    names = {name for group in before.values() for name in group["sha256"]}
    assert names == {name for name in load_file(file_of(saved, form)) if re.search(FACTOR_KEYS, name)}


def test_a_cut_has_the_checksums_of_what_it_keeps(saved: Path, tmp_path: Path) -> None:
    Correction.from_pretrained(saved / "correction").cut(rank=3).save_pretrained(tmp_path / "cut")
    assert Correction.from_pretrained(tmp_path / "cut").ranks == dict.fromkeys(stored_groups(tmp_path / "cut"), 3)
