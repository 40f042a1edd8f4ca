"""Turn calibration and evaluation text into sequences of tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CalibrationError, ConfigError, TokenizerMismatchError
from .conversations import Document, render
from .text import CalibrationSource, read_texts, sources_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["sequences_of", "token_sequences"]

_PIECE = 65_536  # characters; a long document is sampled in pieces, so that few sequences need little tokenizing
_OVERSAMPLING = 4  # tokens that are read for each token that is kept
_CHUNK = 16  # documents per call of the tokenizer


def sequences_of(
    source: CalibrationSource, tokenizer: PreTrainedTokenizerBase, *, limit: int | None, least: int = 1, **options: Any
) -> Tensor:
    """Read a source, or several whose names are separated by commas, and turn its documents into sequences.

    Args:
        source, tokenizer, limit, least: see `read_texts` and `token_sequences`. Of several sources, each gives an equal
            part of `limit`, or all that it has if that is less.
        **options: other arguments of `token_sequences`.

    Raises:
        GlowQError: see `read_texts` and `token_sequences`.
    """
    names = sources_of(source)
    if len(names) == 1:
        return token_sequences(read_texts(source), tokenizer, limit=limit, least=least, **options)
    share = None if limit is None else limit // len(names)
    return torch.cat([token_sequences(read_texts(name), tokenizer, limit=share, **options) for name in names])


def token_sequences(
    texts: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    limit: int | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
    least: int = 1,
) -> Tensor:
    """Tokenize documents, end each with the tokenizer's EOS if it has one, and cut them into sequences without overlap.

    Args:
        texts: documents; no other special token is added to a text. A conversation gets what the chat template adds,
            and no EOS.
        length: tokens per sequence, at least 1; a shorter rest is dropped.
        limit: largest number of tokens to return. The sequences are then a random sample from all documents, of which
            only about four times as many tokens are read. None returns everything, in order.
        seed: seed of the sample.
        vocab_size: number of rows of the model's embedding, to check the ids; None checks nothing.
        least: smallest number of sequences to accept.

    Returns:
        Token ids, shape (n, length), int64, n >= least and n <= limit // length.

    Raises:
        ConfigError: length is below 1.
        CalibrationError: the limit or the text is shorter than `least` sequences, or a conversation cannot be rendered.
        TokenizerMismatchError: an id has no row in the model's embedding.
    """
    if length < 1:
        raise ConfigError(f"length must be at least 1 token, found {length}")
    needed = least * length
    some = "one sequence" if least == 1 else f"{least} sequences"
    if limit is not None and limit < needed:
        raise CalibrationError(
            f"needed {needed} tokens for at least {some} of {length} tokens, found a limit of {limit} tokens; raise it "
            "or take shorter sequences"
        )
    draw = random.Random(seed)
    documents = list(texts)
    if limit is not None:
        documents = [piece for document in documents for piece in _pieces(document)]
        draw.shuffle(documents)
    stream = _tokenize(documents, tokenizer, None if limit is None else _OVERSAMPLING * limit)
    if len(stream) < needed:
        raise CalibrationError(
            f"needed {needed} tokens for {some}, found {len(stream)} in {len(texts)} documents; give more text, or "
            "take shorter sequences"
        )
    if vocab_size is not None and int(stream.max()) >= vocab_size:
        raise TokenizerMismatchError(
            f"{tokenizer.name_or_path or 'the tokenizer'} gave id {int(stream.max())}, the model knows 0 to "
            f"{vocab_size - 1}; use the model's own tokenizer"
        )
    sequences = stream[: len(stream) // length * length].view(-1, length)
    if limit is None or len(sequences) <= limit // length:
        return sequences
    return sequences[sorted(draw.sample(range(len(sequences)), limit // length))]


def _pieces(document: Document) -> list[Document]:
    if not isinstance(document, str):
        return [document]
    return [document[at : at + _PIECE] for at in range(0, len(document), _PIECE)]


def _tokenize(documents: list[Document], tokenizer: PreTrainedTokenizerBase, enough: int | None) -> Tensor:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = [torch.empty(0, dtype=torch.int64)]
    found = 0
    for start in range(0, len(documents), _CHUNK):
        chunk = documents[start : start + _CHUNK]
        texts = [document if isinstance(document, str) else render(document, tokenizer) for document in chunk]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for document, ids in zip(chunk, encoded, strict=True):
            parts.append(torch.tensor([*ids, *end] if isinstance(document, str) else ids, dtype=torch.int64))
            found += len(parts[-1])
        if enough is not None and found >= enough:
            break
    return torch.cat(parts)
