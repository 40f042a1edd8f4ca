"""The divergence of one model's outputs from another's: KL of what it predicts, or squared distance of its states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..errors import SensitivityError

__all__ = ["answer", "class_logits", "divergences", "final_states", "kl_divergences", "kl_gradient"]

_CHUNK = 2**20  # values of the vocabulary's distributions that are computed at a time


_STATES = ("last_hidden_state", "pooler_output", "text_embeds", "image_embeds")
_ENDS = ("start_logits", "end_logits")


def class_logits(output: Any) -> Tensor | None:
    """Return the logits of a model's output, over the classes that a softmax chooses among; None if it holds none.

    Returns:
        Shape (batch, ..., classes). The classes are the tokens of a vocabulary, at each position; or labels, of each
        sample, position or pixel; or for an answer to be found in a text, its positions, for the start and for the end.
        A head with one value, as rerankers have, chooses between yes and no: the second logit is 0.
    """
    logits = getattr(output, "logits", None)
    ends = [end for name in _ENDS if isinstance(end := getattr(output, name, None), Tensor)]
    if len(ends) == len(_ENDS):
        return torch.stack(ends, dim=1)
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        return None
    if logits.dim() == 4:  # the labels of an image's pixels: (batch, classes, height, width)
        logits = logits.movedim(1, -1).flatten(1, 2)
    return logits if logits.shape[-1] > 1 else nn.functional.pad(logits, (0, 1))


def final_states(output: Any) -> list[Tensor]:
    """Return an encoder's final states: token states (batch, length, width), then pooled states (batch, width).

    Any may be missing. States of an image that are laid out as one, (batch, width, height, columns), are its tokens. If
    a model returns none by these names, they are all values that it returns, such as a spectrum or a depth.

    Raises:
        SensitivityError: the output holds none.
    """
    states = [getattr(output, name, None) for name in _STATES]
    found = [state for state in states if isinstance(state, Tensor)]
    if not found and hasattr(output, "to_tuple"):
        values = [value for value in output.to_tuple() if isinstance(value, Tensor) and value.is_floating_point()]
        found = [value for value in values if value.dim() >= 2]
    if not found:
        raise SensitivityError(
            f"the model returned {type(output).__name__}, which holds neither logits nor final states."
        )
    found = [state.flatten(1, -3) if state.dim() > 4 else state for state in found]
    return [state.flatten(2).transpose(1, 2) if state.dim() == 4 else state for state in found]


def answer(output: Any) -> list[Tensor]:
    """Return the tensors that `divergences` compares, float32.

    They are the log probabilities of the next token, or of other classes, see `class_logits`. For an encoder they are
    its final states and the mean of each sequence's token states, as sentence embeddings use it, all scaled to length
    1.

    Raises:
        SensitivityError: see `final_states`.
    """
    logits = class_logits(output)
    if logits is not None:
        return [logits.float().log_softmax(-1)]
    states = [state.float() for state in final_states(output)]
    means = [state.mean(1) for state in states if state.dim() == 3]
    return [normalize(state, dim=-1) for state in (*states, *means)]


def kl_divergences(reference: Tensor, other: Tensor) -> Tensor:
    """KL divergence of every token, in nats: sum of p (log p - log q) over the vocabulary.

    It is computed for some tokens at a time: values of all tokens at once are slower, because each intermediate result
    is written to memory, and for a large vocabulary they take gigabytes.

    Args:
        reference, other: log p and log q, shape (..., vocabulary), float32.

    Returns:
        Shape (...), float32, differentiable in both.
    """
    rows = max(1, _CHUNK // reference.shape[-1])
    pairs = zip(reference.flatten(0, -2).split(rows), other.flatten(0, -2).split(rows), strict=True)
    return torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).reshape(reference.shape[:-1])


def kl_gradient(reference: Tensor, logits: Tensor) -> Tensor:
    """The gradient of the KL divergence, summed over tokens, at a model's logits: the difference of probabilities.

    Args:
        reference: `answer` of the reference, shape (batch, ..., classes), float32.
        logits: logits of the model. If one of the two has more tokens in its vocabulary, only the common ones are
            compared, see `divergences`.

    Returns:
        Shape and dtype of `logits`.
    """
    common = min(reference.shape[-1], logits.shape[-1])
    if reference.shape[-1] > common:
        reference = reference[..., :common].log_softmax(-1)
    found = logits[..., :common].float().softmax(-1).sub_(reference.exp())
    return nn.functional.pad(found, (0, logits.shape[-1] - common)).to(logits.dtype)


def divergences(reference: list[Tensor], other: list[Tensor]) -> Tensor:
    """Compute the KL divergence of every token, in nats, or for an encoder the squared distance of every sequence.

    Args:
        reference: `answer` of the reference model.
        other: `answer` of another model to the same batch. If one of the two has more tokens in its vocabulary, because
            that is padded or was extended, only the common ones are compared.

    Returns:
        float32 tensor of shape (tokens,), or of as many values as have classes, or (batch,) for an encoder,
        differentiable in `other`. For an encoder it is the sum over all states; the distances of token states are
        averaged over the tokens.
    """
    if len(reference) == 1:
        (first,), (second,) = reference, other
        if first.shape[-1] != second.shape[-1]:
            common = min(first.shape[-1], second.shape[-1])
            first, second = (part[..., :common].log_softmax(-1) for part in (first, second))
        return kl_divergences(first, second).flatten()
    parts = [(ours - theirs).square().sum(-1) for ours, theirs in zip(reference, other, strict=True)]
    return torch.stack([part.mean(1) if part.dim() == 2 else part for part in parts]).sum(0)
