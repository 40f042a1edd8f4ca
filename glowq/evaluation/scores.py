"""Paired evaluation: perplexity and KL of several models on the same sequences, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..data.inputs import batches
from ..errors import EvaluationError, NonFiniteError
from ..models.fast_products import fast_products
from ..utils.logging import progress
from ..utils.timeline import stage
from .divergence import kl_divergences
from .intervals import Interval, bootstrap

__all__ = ["Keep", "Score", "make_anew", "perplexity", "perplexity_ratio", "recovered", "score_models", "undone"]

_BATCH_TOKENS = 4096
_BATCH_VALUES = 2**26  # log probabilities of one batch: 256 MiB for each model that is compared


@dataclass(frozen=True)
class Score:
    """The scores of one model, for every sequence.

    Attributes:
        nll: mean negative log-likelihood per predicted token, nats, shape (n,), float64.
        kl: mean KL divergence of this model from the reference per predicted token, nats, shape (n,), float64.
        top1: share of predicted tokens where the model's and the reference's most likely token agree, shape (n,).
    """

    nll: Tensor
    kl: Tensor
    top1: Tensor


_Scores = TypeVar("_Scores")

Keep = Callable[[int, Callable[[], Mapping[str, _Scores]]], Mapping[str, _Scores]]
"""Function (number of a batch, function that scores it) -> the scores of the batch, which may have been stored."""


def make_anew(index: int, make: Callable[[], Mapping[str, _Scores]]) -> Mapping[str, _Scores]:
    """A `Keep` that stores nothing."""
    return make()


@stage("evaluating")
def score_models(models: Mapping[str, nn.Module], sequences: Tensor, keep: Keep[Score] = make_anew) -> dict[str, Score]:
    """Run every model on the same sequences. The first model is the reference for KL and top-1.

    Args:
        models: name -> causal language model; all share one vocabulary.
        sequences: token ids, shape (n, length), int64; each sequence predicts length - 1 tokens.
        keep: stores the scores of each batch.

    Raises:
        EvaluationError: vocabularies differ, or a model returns no logits.
        NonFiniteError: a model's logits hold NaN or Inf.
    """
    parts = []
    size = max(1, min(_BATCH_TOKENS, _BATCH_VALUES // _vocabulary(models)) // sequences.shape[1])
    steps = -(-sequences.shape[0] // size) * len(models)
    with (
        progress(total=steps, desc="Evaluating", unit="batch") as bar,
        torch.no_grad(),
        fast_products(*models.values()),
    ):
        for index, batch in enumerate(batches(sequences, size)):
            parts.append(keep(index, partial(_score_batch, models, batch["input_ids"], bar)))
            bar.update(len(models) * (index + 1) - bar.n)  # a batch that was stored has not moved it
    return {
        name: Score(*(torch.cat([getattr(part[name], key) for part in parts]) for key in ("nll", "kl", "top1")))
        for name in models
    }


def _score_batch(models: Mapping[str, nn.Module], ids: Tensor, bar: Any) -> dict[str, Score]:
    found, reference = {}, None
    for name, model in models.items():
        logp = _log_probabilities(name, model, ids)
        reference = logp if reference is None else reference
        if logp.shape != reference.shape:
            raise EvaluationError(
                f"{name} predicts {logp.shape[-1]} tokens and the reference {reference.shape[-1]}: models with "
                "different vocabularies cannot be compared."
            )
        found[name] = _score(logp, reference, ids)
        bar.update()
    return found


def perplexity(score: Score) -> float:
    """exp of the mean negative log-likelihood. All sequences have the same length, so that every token counts alike."""
    return float(score.nll.mean().exp())


def recovered(reference: Score, quantized: Score, corrected: Score, *, seed: int = 0) -> Interval:
    """Share of the perplexity gap between quantized and reference model that the correction closes (1 = all of it)."""
    columns = torch.stack([reference.nll, quantized.nll, corrected.nll], dim=1)

    def share(means: Tensor) -> Tensor:
        ppl = means.exp()
        return (ppl[..., 1] - ppl[..., 2]) / (ppl[..., 1] - ppl[..., 0])

    return bootstrap(share, columns, seed=seed)


def undone(quantized: Score, corrected: Score, *, seed: int = 0) -> Interval:
    """Share of the quantized model's KL divergence from the reference that the correction undoes (1 = all of it)."""
    columns = torch.stack([quantized.kl, corrected.kl], dim=1)
    return bootstrap(lambda means: 1 - means[..., 1] / means[..., 0], columns, seed=seed)


def perplexity_ratio(first: Score, second: Score, *, seed: int = 0) -> Interval:
    """Perplexity of `second` over that of `first`, paired by sequence."""
    columns = torch.stack([first.nll, second.nll], dim=1)
    return bootstrap(lambda means: (means[..., 1] - means[..., 0]).exp(), columns, seed=seed)


def _vocabulary(models: Mapping[str, nn.Module]) -> int:
    """Size of the vocabulary, as the first model's config has it; 1 if it has none."""
    config: Any = getattr(next(iter(models.values())), "config", None)
    return 1 if config is None else getattr(config.get_text_config(), "vocab_size", None) or 1


def _log_probabilities(name: str, model: nn.Module, ids: Tensor) -> Tensor:
    device = getattr(model, "device", torch.device("cpu"))
    output: Any = model(input_ids=ids.to(device), use_cache=False)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise EvaluationError(f"{name} returns no token logits: perplexity is for causal language models.")
    logp = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    if not bool(torch.isfinite(logp).all()):
        raise NonFiniteError(f"{name}: its logits hold NaN or Inf on the evaluation text.")
    return logp.to(ids.device)


def _score(logp: Tensor, reference: Tensor, ids: Tensor) -> Score:
    nll = -logp.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    kl = kl_divergences(reference, logp)
    top1 = (logp.argmax(-1) == reference.argmax(-1)).double()
    return Score(nll.double().mean(1), kl.double().mean(1), top1.mean(1))
