"""Find and read the files of a model folder: only JSON and safetensors, and nothing outside of the folder."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CorrectionError, ModelNotFoundError, PickleRefusedError, ReadError, UnsafePathError
from .checks import json_fault

__all__ = [
    "PICKLES",
    "check_regular",
    "checkpoint_files",
    "read_json",
    "refuse_irregular",
    "refuse_only_pickles",
    "refuse_pickles",
    "safe_join",
    "stored_variant",
]

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_READ = (".json", ".safetensors", ".gguf", ".model", ".txt", ".jinja")  # files that a library may open by itself
_LARGEST_JSON = 8 * 2**20  # bytes. The largest real ones, of models with many experts, take about two million
_LARGEST_INDEX = 32 * 2**20  # the index of a model with 150,000 tensors takes 14 million
_MOST_DIGITS = 40  # of a whole number; tokenizers write 10^30 for "no limit"
_VARIANT = re.compile(r"model\.safetensors\.index\.(\w+)\.json|model\.(?!safetensors)(\w+)\.safetensors")
_MOST_CONTAINERS = 10**6  # an empty list takes 3 bytes in a file, and 64 in memory


def check_regular(path: Path) -> int | None:
    """The size of a regular file in bytes; None if nothing is there.

    Opening a named pipe waits for ever, and a device may never end, so that no other kind of file is opened.

    Raises:
        ReadError: it is no regular file, or the links to it are a loop, or it cannot be reached.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise ReadError(f"{str(path)!r} cannot be read: {reason}.") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a named pipe, a socket or a device"
        raise ReadError(f"{path} is {kind}; expected a regular file. Download or save the model again.")
    return found.st_size


def refuse_irregular(folder: Path) -> None:
    """Raise an error if a file that a library would open in a folder is no regular file.

    Raises:
        ReadError: see `check_regular`.
    """
    for entry in sorted(folder.iterdir()):
        if entry.name.endswith(_READ):
            check_regular(entry)


def read_json(path: Path, *, largest: int = _LARGEST_JSON) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    NaN and Infinity are accepted, because the config.json of some models holds them. glowq checks its own numbers.

    Args:
        path: the file.
        largest: refuse a file of more bytes.

    Raises:
        ModelNotFoundError: the file does not exist.
        ReadError: it is no regular file, or cannot be read.
        CorrectionError: the file does not hold a JSON object, or one that is too large or nested too deeply, or with
            numbers or characters that cannot be used.
    """
    size = check_regular(path)
    if size is None:
        raise ModelNotFoundError(f"{path} does not exist; expected the folder of a saved model.")
    if size > largest:
        raise CorrectionError(f"{path} has {size:,} bytes, and no such file of a model has more than {largest:,}.")
    try:
        text = path.read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > _MOST_CONTAINERS:
            raise CorrectionError(f"{path} holds more than {_MOST_CONTAINERS:,} lists and objects; refused.")
        value = json.loads(text, parse_int=_whole)
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {error.strerror}.") from error
    except RecursionError:
        raise CorrectionError(f"{path} is nested too deeply; refused.") from None
    except ValueError as error:
        raise CorrectionError(f"{path} is not valid JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise CorrectionError(f"{path} holds {type(value).__name__}, expected a JSON object.")
    fault = json_fault(value)
    if fault is not None:
        raise CorrectionError(f"{path} {fault}; refused.")
    return value


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def safe_join(folder: Path, name: str) -> Path:
    """Return `folder/name`, or raise an error if `name` points outside of `folder`.

    Raises:
        UnsafePathError: `name` is an absolute path, or contains "..", ":" or NUL.
    """
    pure = PurePosixPath(name.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or ":" in name or "\0" in name:
        raise UnsafePathError(f"{name!r} in {folder} points outside its repository; refused.")
    return folder / pure


def refuse_pickles(folder: Path) -> None:
    """Raise an error if a folder holds weights only as pickles.

    Raises:
        PickleRefusedError: the weights are in a format that can run code, and there is no safetensors file.
    """
    refuse_only_pickles(str(folder), [entry.name for entry in folder.iterdir()])


def refuse_only_pickles(where: str, names: Iterable[str]) -> None:
    """Raise an error if the files of a folder or repository hold weights only as pickles.

    Args:
        where: the folder or repository, for the message.
        names: names of its files.

    Raises:
        PickleRefusedError: the weights are in a format that can run code, and there is no safetensors file.
    """
    names = sorted(names)
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise PickleRefusedError(
            f"{where} stores its weights as {pickles[0]}, a pickle, which can run code when it is read. Convert it to "
            "safetensors (save_pretrained of a current transformers does)."
        )


def checkpoint_files(folder: Path, variant: str | None = None) -> list[str]:
    """Return the paths of the safetensors shards of a model folder, sorted by name.

    Args:
        folder: the model's folder.
        variant: name of the variant of the weights, as in `from_pretrained(variant="fp16")`. None takes the weights
            without such a name, or, if there are none, the only variant.

    Raises:
        ModelNotFoundError: there are no such safetensors weights, or a shard is missing.
        PickleRefusedError: the weights are stored only as pickles.
        UnsafePathError: the index names a file outside the folder.
        CorrectionError: the index is damaged.
        ReadError: a shard or the index is no regular file.
    """
    refuse_pickles(folder)
    index_name, *names = _weight_names(variant or stored_variant(folder))
    index = safe_join(folder, index_name)
    if check_regular(index) is not None:
        names = _named_shards(index)
    files = [safe_join(folder, name) for name in names]
    for file in files:
        if check_regular(file) is None:
            raise ModelNotFoundError(f"{file} is missing: the checkpoint in {folder} is incomplete.")
    return [str(file) for file in files]


def _named_shards(index: Path) -> list[str]:
    shards = read_json(index, largest=_LARGEST_INDEX).get("weight_map", {})
    names = list(shards.values()) if isinstance(shards, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise CorrectionError(f"the weight_map of {index} must name a file for every tensor; download it again.")
    return sorted(set(names))


def _weight_names(variant: str | None) -> tuple[str, str]:
    """Names of the index and of the only shard of a model."""
    mark = f".{variant}" if variant else ""
    return f"model.safetensors.index{mark}.json", f"model{mark}.safetensors"


def stored_variant(folder: Path, wanted: str | None = None) -> str | None:
    """The variant of the safetensors weights to read from a folder; None for the weights without such a name.

    Args:
        folder: the model's folder.
        wanted: taken if there are weights of this variant. Otherwise it is the variant whose name all the weights have.

    Raises:
        ModelNotFoundError: there are several variants, and no weights without a name.
    """
    names = [entry.name for entry in folder.iterdir()]
    for variant in (wanted, None):
        if not set(names).isdisjoint(_weight_names(variant)):
            return variant
    found = sorted({match[1] or match[2] for match in map(_VARIANT.fullmatch, names) if match})
    if len(found) > 1:
        raise ModelNotFoundError(
            f"the weights in {folder} are stored as the variants {', '.join(found)}; name the one that was quantized "
            "with variant=..., or save the model again without it."
        )
    return found[0] if found else None
