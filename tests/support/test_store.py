"""The cache of quantized models: anything that could change a model leads to another folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from support import store


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("1")
    return folder


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a temporary store, so that these tests do not change the store of the test run."""
    folder = tmp_path / "kept"
    folder.mkdir()
    monkeypatch.setenv(store.STORE, str(folder))
    monkeypatch.setattr(store, "_store", lambda: folder)


def opened(parent: Path, model: Path, *texts: str) -> Path:
    store.open_store(parent, model, list(texts))
    return Path(os.environ[store.STORE])


def test_the_same_run_finds_the_same_folder(tmp_path: Path, model: Path) -> None:
    first = opened(tmp_path / "parent", model, "text")
    (first / "kept").mkdir()
    assert opened(tmp_path / "parent", model, "text") == first
    assert (first / "kept").is_dir()


@pytest.mark.parametrize("change", ["model", "texts", "packages", "processor", "writers"])
def test_what_changes_a_checkpoint_opens_another_folder(
    change: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(tmp_path / "parent", model, "text")
    other, texts = tmp_path / "other", ["text"]
    other.mkdir()
    (other / "weights").write_text("2" if change == "model" else "1")
    if change == "texts":
        texts = ["te", "xt"]
    elif change == "packages":
        monkeypatch.setattr(store.metadata, "version", lambda name: "0.0.1")
    elif change == "processor":
        monkeypatch.setattr(store.torch.backends.cpu, "get_cpu_capability", lambda: "another")
    elif change == "writers":
        read = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "writers.py"))
    assert opened(tmp_path / "parent", other, *texts) != first


def test_a_folder_that_no_run_used_for_a_day_is_removed(tmp_path: Path, model: Path) -> None:
    parent = tmp_path / "parent"
    for name, age in (("old", store.DAY + 60), ("new", store.DAY - 60)):
        (parent / name / "kept").mkdir(parents=True)
        os.utime(parent / name, (time.time() - age,) * 2)
    current = opened(parent, model, "text")
    os.utime(current, (0, 0))
    assert opened(parent, model, "text") == current
    assert {folder.name for folder in parent.iterdir()} == {"new", current.name}


def test_a_model_is_written_once_for_each_setting_and_source(tmp_path: Path, model: Path) -> None:
    calls = []

    def writer(source: Path, target: Path, **settings: int) -> None:
        calls.append(settings)
        (target / "weights").write_text((source / "weights").read_text() + str(settings))

    first = store.written(writer, model, bits=4, group_size=2)
    assert store.written(writer, model, group_size=2, bits=4) == first
    assert (first / "weights").read_text() == "1{'bits': 4, 'group_size': 2}"
    assert store.written(writer, model, bits=8) != first
    other = tmp_path / "other"
    other.mkdir()
    (other / "weights").write_text("2")
    assert store.written(writer, other, bits=4, group_size=2) != first
    assert len(calls) == 3


def test_a_write_that_was_ended_is_done_again() -> None:
    def ended(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.once("model", ended)
    assert [file.name for file in store.once("model", lambda folder: (folder / "whole").touch()).iterdir()] == ["whole"]
