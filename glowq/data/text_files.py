"""Read the documents of one text file: its encoding, and the records of JSON."""

from __future__ import annotations

import codecs
import io
import json
from pathlib import Path
from typing import Any

from ..errors import CalibrationError

__all__ = ["FOLDER_SUFFIXES", "SUFFIXES", "read_file"]

_LINES = (".jsonl", ".ndjson")
FOLDER_SUFFIXES = (".txt", ".py", ".md", *_LINES)
"""The files that are read in a folder, upper or lower case. A .json file there is seldom text."""

SUFFIXES = (*FOLDER_SUFFIXES, ".json")

# The marks of UTF-32 come first, because that of UTF-32 in little-endian order starts with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


def read_file(path: Path) -> list[Any]:
    """Read the documents of a file.

    Args:
        path: a UTF-8 file, or one in the encoding that its byte order mark names. In a .jsonl or .ndjson file, the
            "text" of the record in each line is a document; in a .json file, each string or each record's "text" of one
            array, or of one record a line. A record without "text" may hold a conversation in "messages". Any other
            file is one document. Upper and lower case of the suffix are alike.

    Raises:
        CalibrationError: the file cannot be read or decoded, or a record has neither "text" nor "messages".
    """
    text, suffix = _decoded(path), path.suffix.lower()
    if suffix == ".json":
        return _array(path, text)
    return _lines(path, text) if suffix in _LINES else [text]


def _decoded(path: Path) -> str:
    try:
        found = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error
    encoding = next((name for mark, name in _MARKS.items() if found.startswith(mark)), "utf-8")
    try:
        text = io.TextIOWrapper(io.BytesIO(found), encoding=encoding).read()  # which also unifies the ends of lines
    except UnicodeDecodeError as error:
        kind = encoding.removesuffix("-sig").upper()
        marked = "" if encoding == "utf-8" else ", which its byte order mark names"
        raise CalibrationError(
            f"{path} is not {kind} text{marked} (byte {error.start}); convert it (iconv -f ENCODING -t UTF-8) or leave "
            "it out"
        ) from error
    if "\0" in text:
        raise CalibrationError(
            f"{path} holds NUL characters: it is binary, or UTF-16 without a byte order mark; convert it (iconv -f "
            "UTF-16LE -t UTF-8, or UTF-16BE) or leave it out"
        )
    return text


def _lines(path: Path, text: str) -> list[Any]:
    texts = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split at U+2028 inside a string
        if line.strip():
            try:
                texts.append(_document(json.loads(line)))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CalibrationError(
                    f'{path}:{number}: expected a JSON object with a field "text" or "messages"'
                ) from error
    return texts


def _array(path: Path, text: str) -> list[Any]:
    if not text.strip():
        return []
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise CalibrationError(f"{path} is nested too deeply to be texts") from error
    except ValueError as error:
        if not text.lstrip().startswith("["):
            return _lines(path, text)  # `datasets` writes one record a line into .json files
        raise CalibrationError(f"{path} is damaged or incomplete JSON ({error})") from error
    records = [found] if isinstance(found, dict) else found
    if not isinstance(records, list):
        raise CalibrationError(f"{path}: expected a JSON array of texts or of records, found {type(found).__name__}")
    texts = []
    for index, record in enumerate(records):
        if isinstance(record, dict) and not {"text", "messages"} & record.keys():
            fields = ", ".join(map(repr, list(record)[:8])) or "none"
            raise CalibrationError(f'{path}: record {index} has no field "text" or "messages", only {fields}')
        texts.append(_document(record) if isinstance(record, dict) else record)
    return texts


def _document(record: Any) -> Any:
    """The text of a record, or the conversation of one without text."""
    return record["text" if "text" in record else "messages"]
