"""Both forms of a corrected model, as every version of the format was written: they load, and answer as they did."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import glowq
from glowq.artifact.correction_config import FORMAT_MINOR, FORMAT_VERSION
from glowq.errors import NewerFormatWarning, VersionError
from glowq.quantizers.model import quantized_modules
from support.cli import call, result_of
from support.tiny import load, quantized

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path.stem for path in GOLDEN.glob("*.zip"))
BITS = {"float": None, "int8": 8, "int4": 4}
IDS = torch.arange(1, 13)[None]  # of write.py


def forms(version: str) -> list[str]:
    """The forms of a version, such as "int8/full"."""
    with zipfile.ZipFile(GOLDEN / f"{version}.zip") as archive:
        return sorted({str(Path(name).parent) for name in archive.namelist() if "/" in name})


CASES = [(version, form) for version in VERSIONS for form in forms(version)]
all_forms = pytest.mark.parametrize(("version", "form"), CASES, indirect=["version"])
newest_forms = pytest.mark.parametrize("form", forms(f"format-{FORMAT_VERSION}.{FORMAT_MINOR}"))
all_dtypes = pytest.mark.parametrize(
    ("version", "dtype"), sorted({(version, form.split("/")[0]) for version, form in CASES}), indirect=["version"]
)


def stored(version: str, folder: Path) -> Path:
    """Unpack a version's files, and name the base by the folder where it is now."""
    with zipfile.ZipFile(GOLDEN / f"{version}.zip") as archive:
        archive.extractall(folder)
    shutil.copytree(GOLDEN / "base", folder / "base")
    for file in folder.glob("*/correction/config.json"):
        change(file.parent, lambda config: config["base_model"].update(name=str(folder / "base")))
    return folder


def change(folder: Path, edit: Any) -> None:
    """Change the stored quantization config of one form."""
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(request.param, tmp_path_factory.mktemp("golden") / request.param)


@pytest.fixture
def newest(tmp_path: Path) -> Path:
    return stored(f"format-{FORMAT_VERSION}.{FORMAT_MINOR}", tmp_path / "golden")


def answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def answers_as_written(model: Any) -> torch.Tensor:
    """The answers that `model` gives on the processor that the logits were written on.

    There, with AVX512-BF16, bitsandbytes computes in bfloat16, and its kernel takes the scale of a wrong block where
    the rows of a weight are no whole number of blocks, as in this base. On other processors it reads the same bytes
    right, which gives other answers. So its layers compute here as they did there.
    """
    for name in quantized_modules(model):
        layer: Any = model.get_submodule(name)
        state, packed = layer.weight.quant_state, layer.weight.data.flatten().long()
        rows, columns = (torch.arange(size) for size in state.shape)
        blocks = rows[:, None] * (state.shape[1] // state.blocksize) + columns // state.blocksize
        codes = torch.stack([packed >> 4, packed & 15], 1).reshape(state.shape)
        weight = (state.code[codes] * state.absmax[blocks]).bfloat16()
        layer.forward = lambda x, weight=weight: F.linear(x.bfloat16(), weight).to(x.dtype)
    return answers(model)


def test_the_newest_format_is_among_them() -> None:
    assert f"format-{FORMAT_VERSION}.{FORMAT_MINOR}" in VERSIONS


@pytest.mark.parametrize("name", VERSIONS)
def test_every_version_is_there_in_all_its_forms(name: str) -> None:
    dtypes = ["float", "int8", "int4"] if name == f"format-{FORMAT_VERSION}.{FORMAT_MINOR}" else ["float", "int8"]
    assert set(forms(name)) == {f"{dtype}/{form}" for dtype in dtypes for form in ("correction", "full")}


@all_forms
def test_it_answers_as_it_did(form: str, version: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", NewerFormatWarning)
        model = load(version / form, dtype=torch.float32)
    expected = load_file(version / "logits.safetensors")[form.partition("/")[0]]
    torch.testing.assert_close(answers_as_written(model), expected, rtol=1e-3, atol=1e-3)
    with glowq.disabled(model):
        assert float((answers(model) - expected).abs().max()) > 0.05


@all_dtypes
def test_it_is_attached_to_its_base_in_memory(dtype: str, version: Path) -> None:
    model = quantized(version / "base", "nf4", dtype=torch.float32)
    correction = glowq.load_correction(model, version / dtype / "correction")
    expected = load_file(version / "logits.safetensors")[dtype]
    torch.testing.assert_close(answers_as_written(model), expected, rtol=1e-3, atol=1e-3)
    assert {entry.bits for entry in correction.factors} == {BITS[dtype]}


@all_forms
def test_it_passes_verify(form: str, version: Path) -> None:
    found = result_of("verify", version / form)
    assert found["groups"] == 4
    assert found["change"] > 0


@all_forms
def test_it_is_saved_in_the_newest_format(form: str, version: Path, tmp_path: Path) -> None:
    """What an old version wrote can be kept: written again, it is of this version and answers alike."""
    model = load(version / form, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert (written["version"], written["minor"]) == (FORMAT_VERSION, FORMAT_MINOR)
    assert torch.equal(answers(load(tmp_path / "again", dtype=torch.float32)), answers(model))


@newest_forms
def test_a_version_from_the_future_is_refused_by_name(form: str, newest: Path) -> None:
    change(newest / form, lambda config: config.update(version=FORMAT_VERSION + 1, colour="red"))
    message = f"format version {FORMAT_VERSION + 1}; the installed glowq reads up to {FORMAT_VERSION}"
    with pytest.raises(VersionError, match=message):
        load(newest / form)
    for command in ("verify", "inspect"):
        done = call(command, newest / form)
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
        assert message in done.stderr
    if form.endswith("correction"):
        with pytest.raises(VersionError, match=message):
            glowq.Correction.from_pretrained(newest / form)


@newest_forms
def test_a_minor_version_from_the_future_is_read_with_a_warning(form: str, newest: Path) -> None:
    change(newest / form, lambda config: config.update(minor=FORMAT_MINOR + 1, colour="red"))
    with pytest.warns(NewerFormatWarning, match=f"'colour', which format {FORMAT_VERSION}.{FORMAT_MINOR + 1} has"):
        model = load(newest / form, dtype=torch.float32)
    expected = load_file(newest / "logits.safetensors")[form.partition("/")[0]]
    torch.testing.assert_close(answers_as_written(model), expected, rtol=1e-3, atol=1e-3)
