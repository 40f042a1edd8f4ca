"""Finished blocks: only an undamaged block of the same run is used again, and one run at a time holds the folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from glowq.artifact.config import GlowQConfig
from glowq.errors import OutputError, RoundingError
from glowq.factors.factors import GroupFactors
from glowq.models.reference import Reference
from glowq.pipeline import block_store
from glowq.pipeline.block_store import BlockFolder, Resume, check_blocks, open_blocks, remove_blocks, run_key
from support.corrections import GROUPS, factors_of
from support.tiny import corrected, load, tiny_llama


def same(first: list[GroupFactors] | None, second: list[GroupFactors]) -> bool:
    return first is not None and all(
        a.group == b.group
        and a.total == b.total
        and torch.equal(a.right, b.right)
        and torch.equal(a.gains, b.gains)
        and all(torch.equal(a.lefts[name], b.lefts[name]) for name in b.lefts)
        for a, b in zip(first, second, strict=True)
    )


def read(blocks: BlockFolder, name: str) -> list[GroupFactors] | None:
    found = blocks.read(name, "this run")
    return None if found is None else found.factors


@pytest.fixture
def blocks(tmp_path: Path) -> Iterator[BlockFolder]:
    with open_blocks(tmp_path / "out.resume") as opened:
        yield opened


def only_file(blocks: BlockFolder) -> Path:
    (file,) = blocks.path.glob("*.safetensors")
    return file


class TestWhatIsUsedAgain:
    def test_a_finished_block_of_the_same_run(self, blocks: BlockFolder) -> None:
        run = Resume(blocks, "this run")
        assert run.load("block", GROUPS) is None
        run.save("block", factors_of(0))
        assert same(run.load("block", GROUPS), factors_of(0))
        assert run.load("another", GROUPS) is None
        assert [path.name for path in blocks.path.parent.iterdir()] == ["out.resume"]

    def test_not_a_block_of_another_run(self, blocks: BlockFolder) -> None:
        Resume(blocks, "another run").save("block", factors_of(0))
        run = Resume(blocks, "this run")
        assert run.load("block", GROUPS) is None
        run.save("block", factors_of(1))
        assert same(run.load("block", GROUPS), factors_of(1))
        assert Resume(blocks, "another run").load("block", GROUPS) is None

    def test_not_a_block_with_other_groups(self, blocks: BlockFolder) -> None:
        run = Resume(blocks, "this run")
        run.save("block", factors_of(0))
        assert run.load("block", [replace(GROUPS[0], members=("q", "v")), GROUPS[1]]) is None

    def test_not_a_block_under_the_name_of_another(self, blocks: BlockFolder) -> None:
        run = Resume(blocks, "this run")
        run.save("first", factors_of(0))
        file = only_file(blocks)
        run.save("second", factors_of(1))
        (other,) = (path for path in blocks.path.glob("*.safetensors") if path != file)
        shutil.copy(file, other)
        assert same(run.load("first", GROUPS), factors_of(0))
        assert run.load("second", GROUPS) is None

    def test_not_the_tensors_of_another_block(self, blocks: BlockFolder) -> None:
        run = Resume(blocks, "this run")
        run.save("block", factors_of(0))
        file = only_file(blocks)
        content = file.read_bytes()
        run.save("block", factors_of(1))
        start = 8 + int.from_bytes(content[:8], "little")
        assert len(content) == file.stat().st_size
        file.write_bytes(file.read_bytes()[:start] + content[start:])
        assert run.load("block", GROUPS) is None

    def test_no_damaged_block(self, blocks: BlockFolder, caplog: pytest.LogCaptureFixture) -> None:
        """Any truncation and any flipped byte: the block is solved again, never read with other values."""
        run = Resume(blocks, "this run")
        run.save("block", factors_of(0))
        file = only_file(blocks)
        content = file.read_bytes()
        for length in range(0, len(content), 7):
            file.write_bytes(content[:length])
            assert run.load("block", GROUPS) is None, length
        for place in range(0, len(content), 3):
            file.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
            found = run.load("block", GROUPS)
            assert found is None or same(found, factors_of(0)), place
        assert re.search(r"safetensors is damaged \(.*\): block 'block' is solved again", caplog.text)
        file.write_bytes(content)
        assert same(run.load("block", GROUPS), factors_of(0))

    @pytest.mark.parametrize("about", [{}, [], 5, {"key": "this run", "block": "block", "groups": {}}], ids=str)
    def test_no_block_with_another_description(self, blocks: BlockFolder, about: Any) -> None:
        """Also with the digest of that description, which somebody computed."""
        run = Resume(blocks, "this run")
        run.save("block", factors_of(0))
        text = json.dumps(about)
        metadata = {"glowq_block": f"{hashlib.sha256(text.encode()).hexdigest()} {text}"}
        save_file(load_file(only_file(blocks)), only_file(blocks), metadata=metadata)
        assert run.load("block", GROUPS) is None

    def test_no_file_of_an_earlier_version(self, blocks: BlockFolder) -> None:
        run = Resume(blocks, "this run")
        run.save("block", factors_of(0))
        save_file(load_file(only_file(blocks)), only_file(blocks))
        assert run.load("block", GROUPS) is None


def _write_and_be_killed(folder: Path) -> None:
    def kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with open_blocks(folder) as blocks:
        blocks.write("first", "this run", factors_of(0))
        Path.replace = kill  # type: ignore[assignment, method-assign]
        blocks.write("second", "this run", factors_of(1))


def test_a_killed_run_leaves_whole_blocks_and_no_lock(tmp_path: Path) -> None:
    process = get_context("fork").Process(target=_write_and_be_killed, args=(tmp_path / "out.resume",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with open_blocks(tmp_path / "out.resume") as blocks:
        run = Resume(blocks, "this run")
        assert same(run.load("first", GROUPS), factors_of(0))
        assert run.load("second", GROUPS) is None
        run.save("second", factors_of(1))
    assert [path.name for path in tmp_path.iterdir()] == ["out.resume"]
    remove_blocks(tmp_path / "out.resume")
    assert not [*tmp_path.iterdir()]


class TestTheFolder:
    def test_one_run_at_a_time(self, blocks: BlockFolder) -> None:
        blocks.write("block", "this run", factors_of(0))
        with pytest.raises(OutputError, match=r"another run keeps its finished blocks in .*out\.resume; wait until"):
            check_blocks(blocks.path)
        remove_blocks(blocks.path)
        assert same(read(blocks, "block"), factors_of(0))

    def test_a_folder_without_blocks_goes(self, tmp_path: Path) -> None:
        check_blocks(tmp_path / "a" / "out.resume")
        assert not [*(tmp_path / "a").iterdir()]

    @pytest.mark.parametrize(
        "name", ["diary", "model.safetensors", "0123456789abcdef.json", "notes.tmp", "config.json", "lock"]
    )
    def test_what_is_no_block_is_refused_and_kept(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("mine")
        with pytest.raises(OutputError, match=f"holds '{name}', which is no finished block of this version of glowq"):
            check_blocks(tmp_path)
        remove_blocks(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert (tmp_path / name).read_text() == "mine"

    @pytest.mark.parametrize("name", ["diary", "0123456789abcdef.safetensors"])
    def test_what_is_put_there_meanwhile_is_kept(self, tmp_path: Path, name: str) -> None:
        folder = tmp_path / "out.resume"
        with open_blocks(folder) as blocks:
            blocks.write("block", "this run", factors_of(0))
            blocks.write("block", "another run", factors_of(1))
            (folder / name).write_text("mine")
        remove_blocks(folder)
        assert [path.name for path in folder.iterdir()] == [name]
        assert (folder / name).read_text() == "mine"

    @pytest.mark.parametrize("kind", ["file", "pipe"])
    def test_one_that_is_no_folder(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "out.resume"
        path.write_text("mine") if kind == "file" else os.mkfifo(path)
        with pytest.raises(OutputError, match="cannot write finished blocks to"):
            check_blocks(path)
        assert path.exists()

    def test_a_full_disk(self, blocks: BlockFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        blocks.write("first", "this run", factors_of(0))

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_bytes", full)
            with pytest.raises(OutputError, match=r"the disk is full\. The earlier blocks are kept: run the same"):
                blocks.write("second", "this run", factors_of(1))
        assert same(read(blocks, "first"), factors_of(0))
        assert [path.name for path in blocks.path.parent.iterdir()] == ["out.resume"]


SETTINGS: dict[str, Any] = {
    "config": GlowQConfig(base="nf4", seed=0),
    "reference": "model: a",
    "ranks": {"q": 8},
    "dtype": torch.bfloat16,
    "sequences": torch.arange(8).reshape(2, 4),
}


class TestTheKey:
    @pytest.mark.parametrize(
        "other",
        [
            {"config": GlowQConfig(base="nf4", seed=1)},
            {"config": GlowQConfig(base="fp4", seed=0)},
            {"reference": "model: b"},
            {"ranks": {"q": 9}},
            {"dtype": torch.float32},
            {"sequences": torch.arange(8).reshape(4, 2)},
            {"sequences": torch.arange(1, 9).reshape(2, 4)},
        ],
        ids=str,
    )
    def test_each_setting_changes_it(self, other: dict[str, Any]) -> None:
        assert run_key(**SETTINGS) == run_key(**SETTINGS)
        assert run_key(**SETTINGS) != run_key(**{**SETTINGS, **other})

    def test_another_version_of_glowq_changes_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = run_key(**SETTINGS)
        monkeypatch.setattr(block_store, "__version__", "0.0.0")
        assert run_key(**SETTINGS) != before

    def test_weights_of_the_reference_change_it(self, tmp_path: Path) -> None:
        model = load(tiny_llama(tmp_path / "model"))
        with Reference(tmp_path / "model", type(model)) as source:
            named = source.identity()
        with Reference(model, type(model)) as source:
            before = source.identity()
            assert source.identity() == before
            with torch.no_grad():
                next(model.parameters())[0, 0] += 1
            assert source.identity() != before
        model.save_pretrained(tmp_path / "model")
        with Reference(tmp_path / "model", type(model)) as source:
            assert source.identity() != named

    def test_int8_factors_are_rounded_from_the_same_blocks(self, tmp_path: Path) -> None:
        """The same ranks of the same text: rounding comes after solving, and the same part of the text is held out."""
        folder, kept = tiny_llama(tmp_path / "model"), tmp_path / "kept"
        plain = corrected(folder, "nf4", method="svd", rank=2, resume=kept)[1]
        first = {path.name: path.read_bytes() for path in kept.iterdir()}
        with suppress(RoundingError):
            corrected(folder, "nf4", method="svd", rank=2, resume=kept, factor_dtype="int8")
        assert {path.name for path in kept.iterdir()} == set(first)
        assert all((kept / name).read_bytes() == content for name, content in first.items())
        again = corrected(folder, "nf4", method="svd", rank=2, resume=kept)[1]
        assert all(torch.equal(again.tensors()[name], value) for name, value in plain.tensors().items())


def test_a_reference_of_odd_tensors_has_an_identity() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("count", torch.tensor(3))
    model.register_buffer("nothing", torch.empty(0))
    model.register_buffer("elsewhere", torch.empty(2, device="meta"))
    with Reference(model, nn.Linear) as source:
        assert len(source.identity()) == 64
