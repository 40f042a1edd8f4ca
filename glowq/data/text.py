"""Read texts from a source that a user names: a list, a file, a folder, a dataset, or the standard library."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from ..errors import CalibrationError, ModelNotFoundError

__all__ = ["CalibrationSource", "read_texts"]

CalibrationSource = str | os.PathLike[str] | Sequence[str]

_SUFFIXES = (".txt", ".py", ".md", ".jsonl")
_DATASET = re.compile(r"[\w-][\w.-]*/[\w.-]+(:.*)?")
_STDLIB = {"python-stdlib": False, "python-stdlib:held-out": True}
_STDLIB_EXCLUDED = ("encodings", "idlelib", "lib2to3/tests/data", "pydoc_data", "site-packages")


def read_texts(source: CalibrationSource) -> list[str]:
    """Read the documents of a source; blank documents are left out.

    Args:
        source: a list of texts; a UTF-8 file (one document; in a .jsonl file, the "text" field of each line is one); a
            folder (all .txt, .py, .md and .jsonl files below it, by relative path); "python-stdlib" or
            "python-stdlib:held-out" (parts of this Python's standard library that share no file); or a `datasets` name
            "org/name" or "org/name:config:split" with a column "text" (split "train" unless given; "train[:1000]" takes
            a slice).

    Returns:
        The documents, at least one, in the order of the source.

    Raises:
        ModelNotFoundError: the file does not exist or the dataset cannot be loaded.
        CalibrationError: all text is blank, a file cannot be read as UTF-8, or a record has no "text".
    """
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        texts = _read_named(name)
    else:
        name, texts = "the list of texts", list(source)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise CalibrationError(f"{name}: expected every text to be str, found {type(text).__name__} at {index}")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise CalibrationError(f"{name} holds no text: expected at least one document that is not blank")
    return texts


def _read_named(name: str) -> list[str]:
    if name in _STDLIB:
        return _read_stdlib(held_out=_STDLIB[name])
    if os.path.isdir(name):
        files = [path for path in Path(name).rglob("*") if path.suffix in _SUFFIXES and path.is_file()]
        files.sort(key=lambda path: path.relative_to(name).as_posix())
        return [text for path in files for text in _read_file(path)]
    if os.path.exists(name):
        return _read_file(Path(name))
    if _DATASET.fullmatch(name) and not name.endswith(_SUFFIXES):
        return _read_dataset(name)
    near = get_close_matches(name, _STDLIB, n=1)
    advice = f"did you mean {near[0]!r}?" if near else "to give the text itself in Python, give a list of strings"
    raise ModelNotFoundError(f"no file or folder {name[:200]!r}; {advice}")


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start}); convert it or leave it out") from error
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix != ".jsonl":
        return [text]
    texts = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split at U+2028 inside a string
        if line.strip():
            try:
                texts.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise CalibrationError(f'{path}:{number}: expected a JSON object with a field "text"') from error
    return texts


def _read_stdlib(*, held_out: bool) -> list[str]:
    root = sysconfig.get_paths()["stdlib"]
    texts = []
    for folder, folders, files in os.walk(root):
        base = Path(folder).relative_to(root)
        folders[:] = sorted(name for name in folders if (base / name).as_posix() not in _STDLIB_EXCLUDED)
        for name in sorted(name for name in files if name.endswith(".py")):
            digest = hashlib.sha1((base / name).as_posix().encode(), usedforsecurity=False).hexdigest()
            if (int(digest, 16) % 50 == 0) is held_out:
                try:
                    texts.append(Path(folder, name).read_text(encoding="utf-8"))
                except UnicodeDecodeError:
                    continue  # test files of the standard library in other encodings
    return texts


def _read_dataset(name: str) -> list[str]:
    import datasets

    repository, config, part = (*name.split(":", 2), "", "")[:3]
    try:
        dataset = datasets.load_dataset(repository, config or None, split=part or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ModelNotFoundError(f"{name!r} is no file here and no dataset that can be loaded: {error}") from error
    if "text" not in dataset.column_names:
        raise CalibrationError(f'dataset {name!r} has no column "text", only {dataset.column_names}')
    return list(dataset["text"])
