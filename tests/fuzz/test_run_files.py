"""Changed files of earlier and of interrupted runs: nothing of a user's is lost, and no damaged block is used."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from glowq.errors import OutputError
from glowq.pipeline.block_store import BlockFolder, Resume
from glowq.utils.manifest import MANIFEST
from glowq.utils.output import check_output, write_directory
from support.corrections import GROUPS, factors_of
from support.forms import applied
from support.fuzzing import Part, parts, refusal
from support.mutations import byte_changes, header_of, json_changes, with_header

RESULT = {"config.json": b"{}\n", "weights/part-1.bin": b"1" * 40, "weights/part-2.bin": b"2" * 40}


def write_result(folder: Path) -> None:
    for name, content in RESULT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("of_user", [True, False], ids=["with-a-users-file", "alone"])
@pytest.mark.parametrize("kind", ["fields", "bytes"])
@parts(1_500)
def test_manifests(part: Part, kind: str, of_user: bool, tmp_path: Path) -> None:
    """A folder is replaced if its manifest lists all of its files as they are, and else nothing in it is changed."""
    target = tmp_path / "out"
    write_directory(target, write_result)
    manifest = (target / MANIFEST).read_bytes()

    def case(change: Any) -> None:
        shutil.rmtree(target)
        target.mkdir()
        write_result(target)
        if of_user:
            (target / "weights" / "notes.txt").write_bytes(b"mine")
        stored = json.loads(manifest) if kind == "fields" else manifest
        text = json.dumps(change(stored), indent=2, sort_keys=True) + "\n" if kind == "fields" else change(manifest)
        (target / MANIFEST).write_bytes(text.encode() if isinstance(text, str) else text)
        before = files_of(target)
        refused = refusal(lambda: write_directory(target, lambda folder: (folder / "new").write_bytes(b"")))
        if refused is None:
            assert not of_user
            assert set(files_of(target)) == {"new", MANIFEST}
        else:
            assert isinstance(refused, OutputError)
            assert files_of(target) == before
            assert isinstance(refusal(lambda: check_output(target)), OutputError)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    part.run(json_changes() if kind == "fields" else byte_changes(len(manifest)), case)


def check_block(file: Path, content: bytes) -> None:
    """A run that continues finds the very factors in the file, or solves the block again."""
    file.write_bytes(content)
    folder = BlockFolder(file.parent)
    found = Resume(folder, "key").load("block", GROUPS)
    assert found is None or applied(found) == applied(factors_of(0))
    assert found is None or [(entry.group, entry.total) for entry in found] == [(group, 1.5) for group in GROUPS]
    folder.remove()
    assert found is None or not file.exists()


@pytest.fixture
def block(tmp_path: Path) -> Path:
    BlockFolder(tmp_path).write("block", "key", factors_of(0))
    (file,) = tmp_path.glob("*.safetensors")
    return file


@parts(4_000)
def test_bytes_of_blocks(part: Part, block: Path) -> None:
    content = block.read_bytes()
    part.run(byte_changes(len(content)), lambda change: check_block(block, change(content)))


@parts(2_000)
def test_headers_of_blocks(part: Part, block: Path) -> None:
    header, values = header_of(block.read_bytes())
    part.run(json_changes(), lambda change: check_block(block, with_header(change(header), values)))


@parts(4_000)
def test_descriptions_of_blocks(part: Part, block: Path) -> None:
    """A description that somebody wrote, with its digest: whatever it says, the run goes on."""
    header, values = header_of(block.read_bytes())
    about = json.loads(header["__metadata__"]["glowq_block"].partition(" ")[2])

    def case(change: Any) -> None:
        text = json.dumps(change(about))
        metadata = {"glowq_block": f"{hashlib.sha256(text.encode()).hexdigest()} {text}"}
        block.write_bytes(with_header({**header, "__metadata__": metadata}, values))
        Resume(BlockFolder(block.parent), "key").load("block", GROUPS)
        BlockFolder(block.parent).remove()

    part.run(json_changes(), case)
