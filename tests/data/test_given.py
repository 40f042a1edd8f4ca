"""What Python programs give as text: lists, data sets in memory, and what looks like them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset

from glowq.data.text import read_texts
from glowq.errors import CalibrationError

ROWS = Dataset.from_dict({"text": ["a", " ", "b"], "label": [0, 1, 0]})


class Frame:
    """What a pandas data frame is to a program that iterates over it: the names of its columns."""

    columns = ("text", "label")

    def __iter__(self) -> Any:
        return iter(self.columns)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, name: str) -> list[str]:
        return {"text": ["a", "b"], "label": ["c", "d"]}[name]


@pytest.mark.parametrize("given", [ROWS, ROWS["text"], Frame()], ids=["data-set", "column", "data-frame"])
def test_the_texts_of_a_data_set(given: Any) -> None:
    assert read_texts(given) == ["a", "b"]


def stream() -> Any:
    yield {"text": "a"}


REFUSED: dict[str, tuple[Any, str]] = {
    "splits": (DatasetDict(train=ROWS, test=ROWS), r"DatasetDict of the splits 'train', 'test'; .* data\['train'\]"),
    "columns": (ROWS[:2], r"dict with the keys 'text', 'label', .* data\[\"text\"\]"),
    "nothing": ({}, r"dict with the keys none"),
    "another column": (
        Dataset.from_dict({"content": ["a"]}),
        r'Dataset has no column "text" or .*, only content',
    ),
    "a stream": (IterableDataset.from_generator(stream), r"IterableDataset, a stream; .*data\.take\(1000\)"),
    "token ids": (torch.ones(2, 3, dtype=torch.int64), r"expected text, found token ids \(Tensor\)"),
    "a number": (5, r"expected text, found int"),
    "bytes": (b"text", r"expected every text to be str, found int at 0"),
    "NUL": (["a", "b\0"], r"text 1 holds NUL characters"),
    "undecodable": (
        ["a", b"caf\xe9".decode(errors="surrogateescape")],
        r"text 1 holds bytes that could not be decoded",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_list_of_texts_is_refused_by_name(kind: str) -> None:
    given, message = REFUSED[kind]
    with pytest.raises(CalibrationError, match=message):
        read_texts(given)
