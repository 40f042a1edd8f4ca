"""Read texts from a source that a user names: a list, a data set, a file, a folder, or the standard library."""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CalibrationError, ModelNotFoundError
from ..utils.names import did_you_mean
from .conversations import Document, message_texts
from .ids import holds_ids
from .read_inputs import holds_inputs
from .text_files import FOLDER_SUFFIXES, SUFFIXES, read_file

__all__ = ["CalibrationSource", "check_source", "read_rows", "read_texts", "sources_of"]

CalibrationSource = str | os.PathLike[str] | Sequence[Document]

_DATASET = re.compile(r"[\w-][\w.-]*/[\w.-]+(:.*)?")
_STDLIB = {"python-stdlib": False, "python-stdlib:held-out": True}
_STDLIB_EXCLUDED = ("encodings", "idlelib", "lib2to3/tests/data", "pydoc_data", "site-packages")
_SURROGATE = re.compile("[\ud800-\udfff]")
_KEYS_SHOWN = 8
_COLUMNS = ("text", "messages")  # the first that a data set has is read


def read_texts(source: CalibrationSource) -> list[Document]:
    """Read the documents of a source; blank documents are left out.

    A record or a column "messages" in place of "text" holds conversations, see `glowq.data.conversations`.

    Args:
        source: a list of texts or of conversations; a data set in memory with a column "text"; a text file (one
            document; in a .jsonl, .ndjson or .json file, each record's "text" is one; see
            `glowq.data.text_files.read_file`); a folder (all .txt, .py, .md, .jsonl and .ndjson files below it, by
            relative path); "python-stdlib" or "python-stdlib:held-out" (parts of this Python's standard library that
            share no file); or a `datasets` name "org/name" or "org/name:config:split" with a column "text" (split
            "train" unless given; "train[:1000]" takes a slice).

    Returns:
        The documents, at least one, in the order of the source.

    Raises:
        ModelNotFoundError: the file does not exist or the dataset cannot be loaded.
        CalibrationError: all text is blank; a file cannot be read as text, or a record has no "text"; a conversation is
            no list of messages of text; or the source is none of the above, such as a mapping or token ids.
    """
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        texts = _read_named(name)
    else:
        name, texts = "the list of texts", _given(source)
    found: list[Document] = []
    for index, document in enumerate(texts):
        if not isinstance(document, str | list | tuple):
            raise CalibrationError(f"{name}: expected every text to be str, found {type(document).__name__} at {index}")
        parts = [document] if isinstance(document, str) else message_texts(name, index, document)
        for text in parts:
            _check_characters(name, index, text)
        if any(text.strip() for text in parts):
            found.append(document)
    if not found:
        raise CalibrationError(f"{name} holds no text: expected at least one document that is not blank")
    return found


def _check_characters(name: str, index: int, text: str) -> None:
    """Refuse what is no text: bytes that were decoded with a wrong encoding."""
    if "\0" in text:
        raise CalibrationError(
            f"{name}: text {index} holds NUL characters, as UTF-16 or binary data does that was read as another "
            'encoding; read it with its own (open(file, encoding="utf-16")), or take them out: text.replace("\\0", "")'
        )
    if _SURROGATE.search(text):
        raise CalibrationError(
            f"{name}: text {index} holds bytes that could not be decoded (lone surrogates); read it with its own "
            'encoding, or replace them: text.encode("utf-8", "replace").decode()'
        )


def sources_of(source: Any) -> list[Any]:
    """The sources that a text names, separated by commas; or the source itself, also if a file has such a name."""
    if not isinstance(source, str) or "," not in source or os.path.exists(source):
        return [source]
    return [part.strip() for part in source.split(",")]


def check_source(source: Any) -> None:
    """Refuse, without reading it, what is neither text nor token ids nor samples, before a model is loaded.

    Raises:
        ModelNotFoundError: the file does not exist.
        CalibrationError: the source is of a kind that neither `read_texts` nor `glowq.data.ids.id_sequences` reads, nor
            `glowq.data.read_inputs.read_inputs`.
    """
    if isinstance(source, (str, os.PathLike)):
        for part in sources_of(os.fspath(source)):
            _check_named(part)
    elif not holds_ids(source) and not holds_inputs(source):
        _check_given(source)


def _given(source: Any) -> list[Any]:
    """The texts of a list or a data set in memory."""
    if holds_ids(source):
        found = type(source).__name__
        raise CalibrationError(f"expected text, found token ids ({found}); give a list of str, a file, or a folder")
    _check_given(source)
    columns = _columns(source)
    return list(source if columns is None else source[_read_column(columns)])


def _check_given(source: Any) -> None:
    kind, columns = type(source).__name__, _columns(source)
    if isinstance(source, Mapping):
        raise CalibrationError(_mapping(kind, source))
    if not isinstance(source, Iterable):
        raise CalibrationError(f"expected text, found {kind}; give a list of str, a file, or a folder")
    if columns is None:
        return
    if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
        raise CalibrationError(
            f"expected texts that can be counted, found {kind}, a stream; take some of them: "
            '[row["text"] for row in data.take(1000)]'
        )
    if _read_column(columns) is None:
        raise CalibrationError(
            f'{kind} has no column "text" or "messages", only {", ".join(map(str, columns))}; give the list of texts '
            "itself: data[column]"
        )


def _columns(source: Any) -> Any:
    """The names of the columns of a data set or a data frame, which may be none; None for anything else."""
    for name in ("column_names", "columns"):
        if hasattr(source, name):
            return getattr(source, name) if getattr(source, name) is not None else ()
    return None


def _read_column(columns: Any) -> str | None:
    """The column that is read of a data set with these columns; None if it has none of `_COLUMNS`."""
    return next((name for name in _COLUMNS if name in columns), None)


def _mapping(kind: str, source: Mapping[Any, Any]) -> str:
    keys = ", ".join(map(repr, list(source)[:_KEYS_SHOWN]))
    if source and all(hasattr(part, "column_names") for part in source.values()):
        return (
            f"expected one data set, found {kind} of the splits {keys}; give one of them: data[{next(iter(source))!r}]"
        )
    return (
        f'expected text or token ids, found {kind} with the keys {keys or "none"}, and "input_ids" is not among them; '
        'give the list of texts itself, for example data["text"], or the result of a tokenizer'
    )


def _read_named(name: str) -> list[str]:
    if name in _STDLIB:
        return _read_stdlib(held_out=_STDLIB[name])
    if os.path.isdir(name):
        files = [path for path in Path(name).rglob("*") if path.suffix.lower() in FOLDER_SUFFIXES and path.is_file()]
        files.sort(key=lambda path: path.relative_to(name).as_posix())
        return [text for path in files for text in read_file(path)]
    if os.path.exists(name):
        return read_file(Path(name))
    return _read_dataset(name)


def _check_named(name: str) -> None:
    """Refuse a name that is no file, no folder, and not of the form of a dataset's."""
    if name in _STDLIB or os.path.exists(name):
        return
    if _DATASET.fullmatch(name) and not name.lower().endswith(SUFFIXES):
        return
    advice = did_you_mean(name, _STDLIB, "To give the text itself in Python, give a list of strings.")
    raise ModelNotFoundError(f"no file or folder {name[:200]!r}. {advice}")


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
    dataset, column = read_rows(name, _COLUMNS)
    return list(dataset[column])


def read_rows(name: str, wanted: Sequence[str]) -> tuple[Any, str]:
    """Load a data set by name, and return it with the first of the wanted columns that it has.

    Raises:
        ModelNotFoundError: it cannot be loaded.
        CalibrationError: it has none of the columns.
    """
    _check_named(name)
    import datasets

    repository, config, part = (*name.split(":", 2), "", "")[:3]
    try:
        dataset = datasets.load_dataset(repository, config or None, split=part or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ModelNotFoundError(f"{name!r} is no file here and no dataset that can be loaded: {error}") from error
    column = next((one for one in wanted if one in dataset.column_names), None)
    if column is None:
        columns = " or ".join(f'"{one}"' for one in wanted)
        raise CalibrationError(f"dataset {name!r} has no column {columns}, only {dataset.column_names}")
    return dataset, column
