"""How much nearer a correction brings a model's answers to the reference's, measured on text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..data.inputs import Samples, batches, rows_of_samples
from ..errors import NonFiniteError
from ..factors.factors import GroupFactors
from ..models.forward import evaluating, to_model
from ..runtime.attach import applied
from ..utils.timeline import stage
from .divergence import answer, divergences
from .figures import finite
from .intervals import mean_interval, text_parts

__all__ = ["improvement", "measured_divergences"]

_BATCH_TOKENS = 1024


def improvement(
    model: nn.Module, reference: nn.Module, factors: Sequence[GroupFactors], sequences: Samples
) -> dict[str, Any]:
    """Measure the divergence from the reference without and with a correction, on the same text.

    Args:
        model: quantized, without a correction; left so.
        reference: the full-precision model.
        factors: the correction.
        sequences: token ids that the factors were not calibrated on, shape (n, length), int64.

    Returns:
        "tokens"; the mean divergences of the "quantized" and the "corrected" model (nats per token; for an encoder the
        squared distance of its states per sequence); and "benefit", their paired difference with its 95% interval:
        "value", "low" and "high", above 0 if the correction is better. The ends are None on too little text.
    """
    found = measured_divergences(model, reference, {"quantized": (), "corrected": factors}, sequences)
    benefit = asdict(mean_interval(text_parts(found["quantized"] - found["corrected"])))
    means = {name: float(values.mean()) for name, values in found.items()}
    return {"tokens": sequences.numel(), **means, "benefit": {name: finite(value) for name, value in benefit.items()}}


@stage("comparing with the reference")
@torch.no_grad()
def measured_divergences(
    model: nn.Module, reference: nn.Module, several: Mapping[str, Sequence[GroupFactors]], sequences: Samples
) -> dict[str, Tensor]:
    """The divergence of a model from the reference with each of several corrections.

    Args:
        model: quantized, without a correction; left so.
        reference: the full-precision model.
        several: name -> factors that are attached together.
        sequences: token ids, shape (n, length), int64.

    Returns:
        Name -> divergence of every token, shape (n, length), or of every sequence or sample of another kind, shape
        (n, 1); float64 on the CPU.

    Raises:
        NonFiniteError: a divergence is NaN or Inf; the message names the model.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in several}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(evaluating(reference))
        for batch in batches(sequences, max(1, _BATCH_TOKENS // sequences.shape[1])):
            wanted = answer(reference(**to_model(batch, reference)))
            inputs = to_model(batch, model)
            for name, factors in several.items():
                with applied(model, factors):
                    given = answer(model(**inputs))
                found = divergences([part.to(given[0].device) for part in wanted], given)
                if not bool(torch.isfinite(found).all()):
                    raise NonFiniteError(
                        f"the divergence of the model ({name}) from the reference is NaN or Inf on held-out text, "
                        "because one of the two returns NaN or Inf: check that both generate, or take another dtype."
                    )
                parts[name].append(rows_of_samples(found.double().cpu(), batch, sequences))
    return {name: torch.cat(found) for name, found in parts.items()}
