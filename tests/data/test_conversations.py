"""Conversations as calibration text: what the tokenizer's own chat template makes of them, from every source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer

import glowq
from glowq.data.overlap import check_disjoint
from glowq.data.text import read_texts
from glowq.data.tokens import token_sequences
from glowq.errors import CalibrationError
from support.tiny import EXAMPLE, quantized, tiny_llama

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": f"What is {n} and {n}?"}, {"role": "assistant", "content": f"It is {2 * n}."}]
    for n in range(40)
]


@pytest.fixture
def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(EXAMPLE)
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(params=["list", "data set", "jsonl", "json"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "list":
        return CHATS
    if request.param == "data set":
        return datasets.Dataset.from_dict({"id": list(range(len(CHATS))), "messages": CHATS})
    file = tmp_path / f"chats.{request.param}"
    records = [{"messages": chat, "id": index} for index, chat in enumerate(CHATS)]
    file.write_text("\n".join(map(json.dumps, records)) if request.param == "jsonl" else json.dumps(records))
    return file


def test_they_become_what_the_chat_template_makes_of_them(source: Any, tokenizer: Any) -> None:
    found = token_sequences(read_texts(source), tokenizer, length=8).flatten()
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    assert texts[0] == "<user>What is 0 and 0?\n<assistant>It is 0.\n"
    stream = torch.tensor([token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert torch.equal(found, stream[: len(found)])
    assert len(stream) - len(found) < 8


def test_a_sample_of_them_is_drawn_like_that_of_texts(tokenizer: Any) -> None:
    first, again, other = (token_sequences(CHATS, tokenizer, length=8, limit=64, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (8, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_texts_and_conversations_in_one_list(tokenizer: Any) -> None:
    documents = read_texts([CHATS[0], "plain text", [{"role": "user", "content": " "}]])
    assert documents == [CHATS[0], "plain text"]
    assert token_sequences(documents, tokenizer, length=4).numel() > 8


def test_a_model_is_corrected_on_them(tokenizer: Any, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    tokenizer.save_pretrained(folder)
    model = quantized(folder, "nf4")
    options: dict[str, Any] = {"calibration_tokens": 512, "sequence_length": 32, "rank": 2, "force": True}
    chats = [[{"role": "user", "content": f"{n} {text}"}] for n in range(4) for text in read_texts("python-stdlib")[:4]]
    correction = glowq.correct(model, reference=folder, tokenizer=tokenizer, calibration=chats, **options)
    assert correction.ranks


def test_an_overlap_is_found(tokenizer: Any) -> None:
    chats = [[{"role": "user", "content": text}] for text in read_texts("python-stdlib")[:3]]
    ids = token_sequences(chats, tokenizer, length=64, limit=2048)
    with pytest.raises(glowq.GlowQError, match="calibrat"):
        check_disjoint(ids, ids, force=False)


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([3], r"to be a list of messages, each with a \"role\" and a \"content\", found a message of type int"),
        ([{"role": "user"}], r'found a message whose "content" is NoneType, not text'),
        ([{"content": "x"}], r'found a message whose "role" is NoneType, not text'),
        ([{"role": "user", "content": [{"type": "image"}]}], r'found a message whose "content" is list, not text'),
        ([{"role": "user", "content": "a\0b"}], "holds NUL characters"),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(chat: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_texts([CHATS[0], chat])


def test_a_record_whose_messages_are_a_text(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": {"role": "user", "content": "x"}}))
    with pytest.raises(CalibrationError, match="expected every text to be str, found dict at 0"):
        read_texts(tmp_path / "chats.jsonl")


def test_a_tokenizer_without_a_chat_template() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    with pytest.raises(CalibrationError, match="has no chat template to turn conversations into text"):
        token_sequences(CHATS, tokenizer, length=8)


def test_a_template_that_refuses_a_conversation(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]
    with pytest.raises(CalibrationError, match="refuses a conversation of user, tool: no tools here"):
        token_sequences([chat], tokenizer, length=1)
