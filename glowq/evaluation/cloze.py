"""A multiple-choice test made from held-out text: which of four continuations follows a passage?

It stands for zero-shot tasks such as HellaSwag where their data cannot be had. An item is a passage of 64 tokens and
four continuations of 16 tokens: the true one, and three that come from other places of the same text. A model chooses
the one to whose tokens it gives the largest mean log-likelihood, as in "Language Models are Few-Shot Learners" (arXiv
2005.14165, section 2.4). By chance it is right in a quarter of the items.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, EvaluationError, NonFiniteError
from ..utils.checks import check_int
from ..utils.logging import progress
from .divergence import class_logits
from .intervals import Interval, bootstrap
from .scores import Keep, make_anew

__all__ = ["CHOICES", "CONTEXT", "CONTINUATION", "ClozeItems", "ClozeScore", "accuracy", "accuracy_gain"]
__all__ += ["cloze_items", "cloze_scores"]

CONTEXT = 64
"""Tokens of a passage."""
CONTINUATION = 16
"""Tokens of a continuation."""
CHOICES = 4
"""Continuations of an item."""

_BATCH_TOKENS = 1024  # about three items; the logits of one item are 300 rows of the vocabulary


@dataclass(frozen=True)
class ClozeItems:
    """The items of a test.

    Attributes:
        contexts: token ids of the passages, shape (n, CONTEXT), int64.
        choices: token ids of the continuations, shape (n, CHOICES, CONTINUATION), int64.
        answers: which of an item's continuations is the true one, shape (n,), int64.
    """

    contexts: Tensor
    choices: Tensor
    answers: Tensor


@dataclass(frozen=True)
class ClozeScore:
    """The answers of one model.

    Attributes:
        likelihoods: mean log-likelihood of each continuation's tokens, nats, shape (n, CHOICES), float64.
        correct: 1 where the true continuation has the largest likelihood, else 0; shape (n,), float64.
    """

    likelihoods: Tensor
    correct: Tensor


_FIGURES = [field.name for field in fields(ClozeScore)]


def cloze_items(sequences: Tensor, count: int, *, seed: int = 0) -> ClozeItems:
    """Make a test from held-out text.

    The passages with their true continuations do not overlap each other. The other continuations of an item differ
    from the true one and from each other, and overlap neither the item's passage nor its true continuation.

    Args:
        sequences: token ids of text that nothing was calibrated on, shape (m, length), int64.
        count: number of items, at least 1.
        seed: seed of the choice of passages, of the continuations, and of their order.

    Raises:
        ConfigError: count is below 1, or the text holds fewer passages, or too few different continuations.
    """
    check_int("the number of cloze items", count, 1)
    step, draw = CONTEXT + CONTINUATION, random.Random(seed)
    each = sequences.shape[1] // step
    if count > each * len(sequences):
        raise ConfigError(
            f"{count} cloze items need {count} passages of {step} tokens, found {each * len(sequences)} in "
            f"{len(sequences)} sequences of {sequences.shape[1]} tokens: give more text, or ask for fewer items."
        )
    slots = sequences.shape[1] // CONTINUATION  # places of a continuation in a sequence
    places = sequences[:, : slots * CONTINUATION].reshape(-1, CONTINUATION)
    contexts, choices, answers = [], [], []
    for passage in sorted(draw.sample(range(each * len(sequences)), count)):
        row, at = divmod(passage, each)
        start = row * slots + at * (step // CONTINUATION)  # the passage's first place
        end = start + step // CONTINUATION
        true = places[end - 1]
        found = _others(places, range(start, end), true, draw)
        answer = draw.randrange(CHOICES)
        found.insert(answer, true)
        contexts.append(places[start : end - 1].flatten())
        choices.append(torch.stack(found))
        answers.append(answer)
    return ClozeItems(torch.stack(contexts), torch.stack(choices), torch.tensor(answers))


def _others(places: Tensor, own: range, true: Tensor, draw: random.Random) -> list[Tensor]:
    """Wrong continuations, drawn from all places except those of the item's `own` passage."""
    found: list[Tensor] = []
    for place in draw.sample(range(len(places)), len(places)):
        candidate = places[place]
        if place not in own and not any(torch.equal(candidate, other) for other in (true, *found)):
            found.append(candidate)
        if len(found) == CHOICES - 1:
            return found
    raise ConfigError(
        f"a cloze item needs {CHOICES - 1} other continuations of {CONTINUATION} tokens, found {len(found)} that "
        "differ: give more text."
    )


@torch.no_grad()
def cloze_scores(
    models: Mapping[str, nn.Module], items: ClozeItems, keep: Keep[ClozeScore] = make_anew
) -> dict[str, ClozeScore]:
    """Let every model answer the same items. The continuations of an item are in one batch.

    Args:
        models: name -> causal language model.
        items: see `cloze_items`.
        keep: stores the answers of each batch.

    Raises:
        EvaluationError: a model returns no logits.
        NonFiniteError: a model's logits hold NaN or Inf.
    """
    count, size = len(items.answers), max(1, _BATCH_TOKENS // (CHOICES * (CONTEXT + CONTINUATION)))
    passages = items.contexts[:, None].expand(-1, CHOICES, -1)
    texts = torch.cat([passages, items.choices], dim=2)  # (n, CHOICES, CONTEXT + CONTINUATION)
    parts = []
    with progress(total=-(-count // size) * len(models), desc="Cloze", unit="batch") as bar:
        for index, (batch, answers) in enumerate(zip(texts.split(size), items.answers.split(size), strict=True)):
            parts.append(keep(index, partial(_answer_batch, models, batch, answers, bar)))
            bar.update(len(models) * (index + 1) - bar.n)  # a batch that was stored has not moved it
    return {
        name: ClozeScore(*(torch.cat([getattr(part[name], key) for part in parts]) for key in _FIGURES))
        for name in models
    }


def _answer_batch(models: Mapping[str, nn.Module], texts: Tensor, answers: Tensor, bar: Any) -> dict[str, ClozeScore]:
    found = {}
    for name, model in models.items():
        likelihoods = _likelihoods(name, model, texts.flatten(0, 1)).view(-1, CHOICES)
        found[name] = ClozeScore(likelihoods, (likelihoods.argmax(1) == answers).double())
        bar.update()
    return found


def _likelihoods(name: str, model: nn.Module, ids: Tensor) -> Tensor:
    """Mean log-likelihood of the last CONTINUATION tokens of each row of `ids`, shape (b,), float64, on the CPU."""
    device = getattr(model, "device", torch.device("cpu"))
    logits = class_logits(model(input_ids=ids.to(device), use_cache=False))
    if logits is None:
        raise EvaluationError(f"{name} returns no token logits: a cloze test is for causal language models.")
    logp = logits[:, -CONTINUATION - 1 : -1].float().log_softmax(-1)
    if not bool(torch.isfinite(logp).all()):
        raise NonFiniteError(f"{name}: its logits hold NaN or Inf on the text of the cloze test.")
    chosen = ids[:, -CONTINUATION:, None].to(logp.device)
    return logp.gather(-1, chosen)[..., 0].double().mean(1).cpu()


def accuracy(score: ClozeScore, *, seed: int = 0) -> Interval:
    """Share of items that the model got right, with its bootstrap interval over items; `seed` is the bootstrap's."""
    return bootstrap(lambda means: means[..., 0], score.correct[:, None], seed=seed)


def accuracy_gain(first: ClozeScore, second: ClozeScore, *, seed: int = 0) -> Interval:
    """Accuracy of `second` less that of `first`, paired by item."""
    columns = torch.stack([first.correct, second.correct], dim=1)
    return bootstrap(lambda means: means[..., 1] - means[..., 0], columns, seed=seed)
