"""How far one model's answer lies from another's: KL of the next token, or the distance of an encoder's states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import SensitivityError

__all__ = ["answer", "divergences", "final_states", "token_logits"]


def token_logits(output: Any) -> Tensor | None:
    """Logits of shape (batch, length, vocabulary), if a model's output holds any."""
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.dim() == 3 else None


def final_states(output: Any) -> list[Tensor]:
    """An encoder's states: of the tokens, shape (batch, length, width), then pooled, (batch, width), if there are any.

    Raises:
        SensitivityError: the output holds neither.
    """
    states = [getattr(output, name, None) for name in ("last_hidden_state", "pooler_output")]
    found = [state for state in states if isinstance(state, Tensor)]
    if not found:
        raise SensitivityError(
            f"the model returned {type(output).__name__}, which holds neither token logits nor final states."
        )
    return found


def answer(output: Any) -> list[Tensor]:
    """What `divergences` compares: the logarithms of the next token's chances, or states of length 1, all float32.

    Of an encoder: its states, and the mean of a sequence's token states, which is what sentence embeddings are made of.

    Raises:
        SensitivityError: see `final_states`.
    """
    logits = token_logits(output)
    if logits is not None:
        return [logits.float().log_softmax(-1)]
    states = [state.float() for state in final_states(output)]
    means = [state.mean(1) for state in states if state.dim() == 3]
    return [normalize(state, dim=-1) for state in (*states, *means)]


def divergences(reference: list[Tensor], other: list[Tensor]) -> Tensor:
    """KL divergence from `reference` of every token, nats; of an encoder, squared distances summed for every sequence.

    Args:
        reference: an `answer`.
        other: another model's `answer` to the same batch.

    Returns:
        float32, shape (tokens,) or (batch,); differentiable in `other`.
    """
    if len(reference) == 1:
        (first,), (second,) = reference, other
        return (first.exp() * (first - second)).sum(-1).flatten()
    parts = [(ours - theirs).square().sum(-1) for ours, theirs in zip(reference, other, strict=True)]
    return torch.stack([part.mean(1) if part.dim() == 2 else part for part in parts]).sum(0)
