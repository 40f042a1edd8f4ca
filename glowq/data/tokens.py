"""Turn calibration and evaluation text into token batches. `glowq.data.text` reads the text."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CalibrationError, ConfigError, TokenizerMismatchError
from .conversations import Document, render
from .inputs import Inputs, Samples, SomeSamples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["batches", "split", "token_sequences"]

_PIECE = 65_536  # characters; a long document is sampled in pieces, so that few sequences need little tokenizing
_OVERSAMPLING = 4  # tokens that are read for each token that is kept
_CHUNK = 16  # documents per call of the tokenizer


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


def batches(sequences: Samples, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Yield model inputs of `batch_size` sequences; the last batch may be smaller.

    Args:
        sequences: token ids, shape (n, length), int64; or samples of another kind, of which those of other shapes start
            a new batch.
        batch_size: sequences in a batch, at least 1.

    Yields:
        {"input_ids", "attention_mask"}, both shape (b, length), int64, b <= batch_size; the mask is all ones. For
        samples of another kind, their fields.

    Raises:
        ConfigError: batch_size is below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, found {batch_size}")
    if isinstance(sequences, Inputs):
        yield from sequences.split(batch_size)
        return
    for input_ids in sequences.split(batch_size):
        yield {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def split(sequences: SomeSamples, fraction: float, seed: int = 0) -> tuple[SomeSamples, SomeSamples]:
    """Split sequences at random into those to calibrate on and those to measure on. Both parts keep the order.

    Args:
        sequences: token ids, shape (n, length), n >= 2, or as many samples of another kind.
        fraction: share to hold out, 0 < fraction < 1. It is rounded to whole sequences, at least one in each part.
        seed: seed of the choice of held-out sequences.

    Returns:
        (train, held_out), shapes (n - h, length) and (h, length): disjoint rows of `sequences`.

    Raises:
        ConfigError: fraction is outside (0, 1).
        CalibrationError: fewer than two sequences.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"the held-out fraction must lie between 0 and 1, found {fraction}")
    count = len(sequences)
    if count < 2:
        raise CalibrationError(
            f"needed 2 sequences to hold one out, found {count}: give at least {2 * sequences.shape[1]} tokens, or "
            f"take shorter sequences than {sequences.shape[1]}"
            if isinstance(sequences, Tensor)
            else f"needed 2 samples to hold one out, found {count}: give more"
        )
    held = torch.zeros(count, dtype=torch.bool)
    held[random.Random(seed).sample(range(count), min(max(1, round(count * fraction)), count - 1))] = True
    return sequences[~held], sequences[held]
