"""Text files in every encoding and in every kind of JSON, read by the function that all commands use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glowq.data.text import read_texts
from glowq.errors import CalibrationError

TEXT = "caf\u00e9\nna\u00efve\n"
MARKED = {"utf-8-sig": b"", "utf-16": b"", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff", "utf-32": b""}


@pytest.mark.parametrize("encoding", MARKED)
def test_a_byte_order_mark_names_the_encoding(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(MARKED[encoding] + TEXT.encode(encoding))
    assert read_texts(path) == [TEXT]


@pytest.mark.parametrize("encoding", MARKED)
def test_json_lines_with_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(MARKED[encoding] + '{"text": "a"}\r\n{"text": "b"}\r\n'.encode(encoding))
    assert read_texts(path) == ["a", "b"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_refused_with_the_remedy(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes("plain ascii text".encode(encoding))
    with pytest.raises(CalibrationError, match=r"notes\.txt holds NUL characters: .*iconv -f UTF-16LE -t UTF-8"):
        read_texts(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9", r"notes\.txt is not UTF-8 text \(byte 3\); convert it \(iconv"),
        (b"\xff\xfea\x00b", r"notes\.txt is not UTF-16 text, which its byte order mark names"),
        (b"\xef\xbb\xbfcaf\xe9", r"notes\.txt is not UTF-8 text, which its byte order mark names"),
        (b"PK\x03\x04\x00\x00", r"notes\.txt holds NUL characters: it is binary"),
    ],
)
def test_what_is_no_text_is_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_texts(tmp_path / "notes.txt")


@pytest.mark.parametrize("suffix", ["JSONL", "Jsonl", "ndjson", "NDJSON"])
def test_the_case_of_the_suffix_does_not_matter(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert read_texts(path) == read_texts(tmp_path) == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(["a", "b"]),
        json.dumps([{"text": "a", "id": 1}, {"text": "b"}], indent=2),
        '{"text": "a"}\n{"text": "b"}\n',  # what `Dataset.to_json` writes
    ],
    ids=["texts", "records", "a-record-a-line"],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.JSON"])
def test_a_json_file_holds_texts_or_records(content: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert read_texts(tmp_path / name) == ["a", "b"]


def test_one_record_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"text": "a"}')
    assert read_texts(tmp_path / "rows.json") == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("5", r"rows\.json: expected a JSON array of texts or of records, found int"),
        ('{"data": ["a"]}', r"rows\.json: record 0 has no field \"text\" or .*, only 'data'"),
        (
            '[{"text": "a"}, {"content": "b"}]',
            r"rows\.json: record 1 has no field \"text\" or .*, only 'content'",
        ),
        ('["a", 2]', r"rows\.json: expected every text to be str, found int at 1"),
        ('["a", "b"', r"rows\.json is damaged or incomplete JSON"),
        (
            '{"text": "a"}\n{"content": "b"}',
            r"rows\.json:2: expected a JSON object with a field \"text\" or",
        ),
        ("plain text", r"rows\.json:1: expected a JSON object with a field \"text\" or"),
        ("[" * 100_000, r"rows\.json (is nested too deeply|is damaged or incomplete)"),
        ("", r"rows\.json holds no text"),
        ('["\\u0000"]', r"text 0 holds NUL characters"),
        ('["\\ud800"]', r"text 0 holds bytes that could not be decoded"),
    ],
)
def test_other_json_is_refused_by_name(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(CalibrationError, match=message):
        read_texts(tmp_path / "rows.json")


def test_the_json_files_of_a_folder_are_seldom_text(tmp_path: Path) -> None:
    (tmp_path / "a.TXT").write_text("a")
    (tmp_path / "config.json").write_text("{}")
    assert read_texts(tmp_path) == ["a"]
