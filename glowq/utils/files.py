"""Find and read the files of a model folder: only JSON and safetensors, and nothing outside of the folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CorrectionError, ModelNotFoundError, PickleRefusedError, UnsafePathError

__all__ = ["PICKLES", "checkpoint_files", "read_json", "refuse_only_pickles", "refuse_pickles", "safe_join"]

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        ModelNotFoundError: the file does not exist.
        CorrectionError: the file does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path} does not exist; expected the folder of a saved model.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorrectionError(f"{path} is not valid JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise CorrectionError(f"{path} holds {type(value).__name__}, expected a JSON object.")
    return value


def safe_join(folder: Path, name: str) -> Path:
    """Return `folder/name`, or raise an error if `name` points outside of `folder`.

    Raises:
        UnsafePathError: `name` is an absolute path, or contains ".." or ":".
    """
    pure = PurePosixPath(name.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or ":" in name:
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


def checkpoint_files(folder: Path) -> list[str]:
    """Return the paths of the safetensors shards of a model folder, sorted by name.

    Raises:
        ModelNotFoundError: there are no safetensors weights, or a shard is missing.
        PickleRefusedError: the weights are stored only as pickles.
        UnsafePathError: the index names a file outside the folder.
    """
    refuse_pickles(folder)
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    files = [safe_join(folder, name) for name in names]
    for file in files:
        if not file.is_file():
            raise ModelNotFoundError(f"{file} is missing: the checkpoint in {folder} is incomplete.")
    return [str(file) for file in files]
