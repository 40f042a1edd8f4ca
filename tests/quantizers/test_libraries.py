"""Missing libraries and untested versions of libraries: the message names the library and says what to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import glowq
from glowq import errors
from glowq.cli.app import app
from glowq.quantizers import registry as backends
from glowq.quantizers.model import prepare_model
from glowq.utils.versions import warn_untested
from support.bases import BASES
from support.tiny import TEXTS, corrected, load

ROWS = {base.name: base for base in BASES}


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """A function that runs a command, asserts that it fails with status 1, and returns the error line."""
    notes = tmp_path / "notes.txt"
    notes.write_text("\n".join(TEXTS))

    def run(command: str, *arguments: Any) -> str:
        options = ["--calibration", notes, "--output", tmp_path / "out"] if command == "correct" else ["--data", notes]
        done = CliRunner().invoke(app, [str(word) for word in (command, *arguments, *options)])
        assert done.exit_code == 1, done.output
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("glowq: error: ")]
        return line

    return run


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that makes a library look as if it were not installed."""
    real = importlib.util.find_spec

    def hide(package: str) -> None:
        def find(name: str, *rest: Any) -> Any:
            return None if name == package else real(name, *rest)

        monkeypatch.setattr(importlib.util, "find_spec", find)

    return hide


METHODS = {
    "bitsandbytes": {"load_in_4bit": True},
    "gptq": {"bits": 4, "group_size": 64},
    "awq": {"bits": 4, "group_size": 64, "version": "gemm"},
    "hqq": {},
    "quanto": {"weights": "int4"},
    "compressed-tensors": {"config_groups": {}},
    "torchao": {"quant_type": {}},
}


@pytest.mark.parametrize("method", METHODS)
def test_an_absent_library_of_a_quantized_model(
    method: str, source: Path, refused: Any, absent: Any, tmp_path: Path
) -> None:
    backend = backends.backend_of(method)
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **METHODS[method]}
    (folder / "config.json").write_text(json.dumps(config))
    absent(backend.package)
    advice = f"needs {backend.package}, which is not installed: pip install 'glowq[{backend.extra}]'"
    assert advice in refused("correct", folder, "--reference", source)
    assert advice in refused("evaluate", source, folder)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["correction", "full"])
def test_an_absent_library_of_a_saved_correction(
    method: str, form: str, source: Path, refused: Any, absent: Any, tmp_path: Path
) -> None:
    backend = backends.backend_of(method)
    model, correction = (
        corrected(source, "torchao-int8") if ROWS["torchao-int8"].installed else corrected(source, "nf4")
    )
    correction.save_pretrained(tmp_path / "model") if form == "correction" else model.save_pretrained(
        tmp_path / "model"
    )
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["base"] = {"quant_method": method, **METHODS[method]}
    file.write_text(json.dumps(config))
    absent(backend.package)
    advice = rf"{method} model needs {backend.package}.* pip install 'glowq\[{backend.extra}\]'"
    with pytest.raises(errors.UnknownBaseError, match=advice):
        load(tmp_path / "model")
    if form == "correction":
        with pytest.raises(errors.UnknownBaseError, match=advice):
            glowq.load_correction(model, tmp_path / "model")
    assert re.search(advice, refused("evaluate", source, tmp_path / "model"))


def test_an_absent_parent_of_a_library_is_an_absent_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str, *rest: Any) -> None:
        raise ModuleNotFoundError("No module named 'optimum'")  # Python's error for "optimum.quanto" without optimum

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(errors.UnknownBaseError, match=r"needs optimum\.quanto.*pip install 'glowq\[quanto\]'"):
        backends.base_config("quanto-int4")


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """A function that makes a distribution report another version."""
    real = importlib.metadata.version

    def set_version(distribution: str, found: str) -> None:
        def version(name: str) -> str:
            return found if canonical(name) == distribution else real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    warn_untested.cache_clear()
    yield set_version
    warn_untested.cache_clear()


def untested(models: list[Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model in models:
            prepare_model(model)
            prepare_model(model)
    return [str(entry.message) for entry in caught if issubclass(entry.category, errors.UntestedVersionWarning)]


@pytest.mark.parametrize(
    ("names", "distribution"),
    [
        (("nf4", "int8"), "bitsandbytes"),
        (("torchao-int8",), "torchao"),
        (("auto-gptq-int4", "awq-int4"), "gptqmodel"),
        (("hqq-4",), "hqq"),
        (("quanto-int8",), "optimum-quanto"),
        (("w4a16",), "compressed-tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_untested_version_is_named_once(names: tuple[str, ...], distribution: str, version: Any) -> None:
    chosen = [ROWS[name] for name in names]
    models = [base.load() for base in chosen]
    assert untested(models) == []
    warn_untested.cache_clear()
    tested = next(iter(prepare_model(models[0]).values())).tested
    warn_untested.cache_clear()
    version(distribution, "99.1")
    (message,) = untested(models)
    name, _, rest = message.partition(" ")
    assert canonical(name) == distribution
    assert rest.startswith("99.1 is outside the versions")
    assert f"glowq is tested with ({tested})" in message
