"""Paired evaluation: perplexity and KL of several models on the same sequences, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .data import batches
from .errors import EvaluationError, NonFiniteError
from .progress import progress

__all__ = [
    "NO_GAP",
    "Interval",
    "Score",
    "bootstrap",
    "finite",
    "has_gap",
    "perplexity",
    "perplexity_ratio",
    "recovered",
    "score_models",
    "shown",
    "shown_share",
]

NO_GAP = "no gap to recover"

_BATCH_TOKENS = 4096
_LEAST_GAP = 1e-3  # of the reference's perplexity: a share of less is the noise of the text, divided by next to nothing


@dataclass(frozen=True)
class Score:
    """One model on every sequence.

    Attributes:
        nll: mean negative log-likelihood per predicted token, nats, shape (n,), float64.
        kl: mean KL divergence of this model from the reference per predicted token, nats, shape (n,), float64.
        top1: share of predicted tokens where the model's and the reference's most likely token agree, shape (n,).
    """

    nll: Tensor
    kl: Tensor
    top1: Tensor


@dataclass(frozen=True)
class Interval:
    """A figure with its 95% percentile-bootstrap interval over sequences."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def score_models(models: Mapping[str, nn.Module], sequences: Tensor) -> dict[str, Score]:
    """Run every model over the same sequences; the first is the reference that KL and top-1 are taken against.

    Args:
        models: name -> causal language model; all share one vocabulary.
        sequences: token ids, shape (n, length), int64; each sequence predicts length - 1 tokens.

    Raises:
        EvaluationError: vocabularies differ, or a model returns no logits.
        NonFiniteError: a model's logits hold NaN or Inf.
    """
    parts: dict[str, list[Score]] = {name: [] for name in models}
    size = max(1, _BATCH_TOKENS // sequences.shape[1])
    steps = -(-sequences.shape[0] // size) * len(models)
    with progress(total=steps, desc="Evaluating", unit="batch") as bar, torch.no_grad():
        for batch in batches(sequences, size):
            ids, reference = batch["input_ids"], None
            for name, model in models.items():
                logp = _log_probabilities(name, model, ids)
                reference = logp if reference is None else reference
                if logp.shape != reference.shape:
                    raise EvaluationError(
                        f"{name} predicts {logp.shape[-1]} tokens and the reference {reference.shape[-1]}: models with "
                        "different vocabularies cannot be compared."
                    )
                parts[name].append(_score(logp, reference, ids))
                bar.update()
    return {
        name: Score(*(torch.cat([getattr(part, key) for part in rows]) for key in ("nll", "kl", "top1")))
        for name, rows in parts.items()
    }


def perplexity(score: Score) -> float:
    """exp of the mean negative log-likelihood; every sequence has the same length."""
    return float(score.nll.mean().exp())


def bootstrap(
    statistic: Callable[[Tensor], Tensor], columns: Tensor, *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap over sequences, all columns resampled together (paired).

    Args:
        statistic: means of the columns, shape (..., k) -> figure, shape (...).
        columns: one row a sequence, shape (n, k), float64.
        resamples: how often n rows are drawn with replacement.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    count = columns.shape[0]
    rows = torch.randint(count, (resamples, count), generator=generator)
    draws = statistic(columns[rows].mean(1))
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return Interval(float(statistic(columns.mean(0))), low, high)


def recovered(reference: Score, quantized: Score, corrected: Score, *, seed: int = 0) -> Interval:
    """Share of the perplexity gap between quantized and reference model that the correction closes (1 = all of it)."""
    columns = torch.stack([reference.nll, quantized.nll, corrected.nll], dim=1)

    def share(means: Tensor) -> Tensor:
        ppl = means.exp()
        return (ppl[..., 1] - ppl[..., 2]) / (ppl[..., 1] - ppl[..., 0])

    return bootstrap(share, columns, seed=seed)


def has_gap(reference: float | None, quantized: float | None) -> bool:
    """Whether a share of the gap between two perplexities says anything; None is one that is undefined."""
    return reference is None or quantized is None or quantized >= (1 + _LEAST_GAP) * reference


def finite(value: float) -> float | None:
    """`value`, or None (JSON's null) where it is NaN or infinite."""
    return value if math.isfinite(value) else None


def shown(value: float | None, form: str) -> str:
    """A figure for people in a format such as ".4f"; one that is undefined (None) says so."""
    return "undefined" if value is None else format(value, form)


def shown_share(figures: Mapping[str, Any]) -> str:
    """The share of the gap that was recovered, for people: with its interval, or with the reason why it says nothing.

    Args:
        figures: "reference" and "quantized", perplexities; "recovered"; and "recovered_ci95", (low, high) or None where
            there were too few sequences to resample. Any of them is None where it is undefined.
    """
    if not has_gap(figures["reference"], figures["quantized"]):
        return NO_GAP
    share, limits = shown(figures["recovered"], ".1%"), figures.get("recovered_ci95")
    if limits is None:
        return f"too few tokens to tell ({share})"
    return f"{share} [{shown(limits[0], '.1%')}, {shown(limits[1], '.1%')}]"


def perplexity_ratio(first: Score, second: Score, *, seed: int = 0) -> Interval:
    """Perplexity of `second` over that of `first`, paired by sequence."""
    columns = torch.stack([first.nll, second.nll], dim=1)
    return bootstrap(lambda means: (means[..., 1] - means[..., 0]).exp(), columns, seed=seed)


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
    kl = (reference.exp() * (reference - logp)).sum(-1)
    top1 = (logp.argmax(-1) == reference.argmax(-1)).double()
    return Score(nll.double().mean(1), kl.double().mean(1), top1.mean(1))
