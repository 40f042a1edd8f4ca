"""Calibration and evaluation text to token batches.

Text may be a list, a file, a folder, a `datasets` name, or the Python standard library, which is on every machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import CalibrationError, ConfigError, ModelNotFoundError, TokenizerMismatchError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CalibrationSource", "batches", "read_texts", "split", "token_sequences"]

CalibrationSource = str | os.PathLike[str] | Sequence[str]

_SUFFIXES = (".txt", ".py", ".md", ".jsonl")
_DATASET = re.compile(r"[\w-][\w.-]*/[\w.-]+(:.*)?")
_STDLIB = {"python-stdlib": False, "python-stdlib:held-out": True}
_STDLIB_EXCLUDED = ("encodings", "idlelib", "lib2to3/tests/data", "pydoc_data", "site-packages")
_PIECE = 65_536  # characters: a long document is sampled piece by piece, never tokenized whole for a few sequences
_OVERSAMPLING = 4  # tokens read for each one kept
_CHUNK = 16  # documents a tokenizer call


def read_texts(source: CalibrationSource) -> list[str]:
    """Documents of a source, blank ones left out.

    Args:
        source: a list of texts; a UTF-8 file (one document, or one per line's "text" field in .jsonl); a folder (all
            .txt, .py, .md and .jsonl files below it, by relative path); "python-stdlib" or "python-stdlib:held-out"
            (disjoint parts of this Python's standard library); else a `datasets` name "org/name" or
            "org/name:config:split" with a column "text" (split "train" unless given; "train[:1000]" takes a slice).

    Returns:
        The documents, at least one, in the order above.

    Raises:
        ModelNotFoundError: the file does not exist or the dataset cannot be loaded.
        CalibrationError: nothing but blank text, a file that cannot be read as UTF-8, or a record without "text".
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
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: it would break at U+2028 inside a string
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
                    continue  # the library's own tests of other encodings
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


def token_sequences(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    limit: int | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
    least: int = 1,
) -> Tensor:
    """Documents tokenized, each ended by the tokenizer's EOS if it has one, and cut into sequences without overlap.

    Args:
        texts: documents; no other special token is added to them.
        length: tokens of a sequence, at least 1; a shorter rest is dropped.
        limit: most tokens to return. The sequences are then a seeded sample spread over all documents, of which only
            about four times as many tokens are read. None: everything, in order.
        seed: which sample.
        vocab_size: rows of the model's embedding, to check the ids against.
        least: fewest sequences that will do.

    Returns:
        Token ids, shape (n, length), int64, n >= least and n <= limit // length.

    Raises:
        ConfigError: length is below 1.
        CalibrationError: the limit or the text is shorter than `least` sequences.
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
        documents = [text[at : at + _PIECE] for text in documents for at in range(0, len(text), _PIECE)]
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


def _tokenize(documents: list[str], tokenizer: PreTrainedTokenizerBase, enough: int | None) -> Tensor:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = [torch.empty(0, dtype=torch.int64)]
    found = 0
    for start in range(0, len(documents), _CHUNK):
        encoded = tokenizer(documents[start : start + _CHUNK], add_special_tokens=False, verbose=False)["input_ids"]
        parts += [torch.tensor([*ids, *end], dtype=torch.int64) for ids in encoded]
        found += sum(len(ids) + len(end) for ids in encoded)
        if enough is not None and found >= enough:
            break
    return torch.cat(parts)


def batches(sequences: Tensor, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Model inputs, `batch_size` sequences at a time; the last batch may be smaller.

    Args:
        sequences: token ids, shape (n, length), int64.
        batch_size: sequences in a batch, at least 1.

    Yields:
        {"input_ids", "attention_mask"}, both shape (b, length), int64, b <= batch_size; the mask is all ones.

    Raises:
        ConfigError: batch_size is below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, found {batch_size}")
    for input_ids in sequences.split(batch_size):
        yield {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def split(sequences: Tensor, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences parted at random into those to calibrate on and those to measure on, each in its old order.

    Args:
        sequences: token ids, shape (n, length), n >= 2.
        fraction: share held out, 0 < fraction < 1, rounded to whole sequences, at least one on either side.
        seed: which sequences are held out.

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
        )
    held = torch.zeros(count, dtype=torch.bool)
    held[random.Random(seed).sample(range(count), min(max(1, round(count * fraction)), count - 1))] = True
    return sequences[~held], sequences[held]
