"""What every benchmark says of a corrected model, so that their figures mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glowq import Correction
from glowq.evaluation import Score, perplexity, perplexity_ratio, recovered

__all__ = ["figures"]


def figures(before: Mapping[str, Score], after: Score, correction: Correction, seed: int) -> dict[str, Any]:
    """One row's figures, with 95% bootstrap intervals over sequences.

    Args:
        before: scores of "reference" and "quantized".
        after: score of the corrected model, on the same sequences.
        correction: what was attached.
        seed: of the bootstrap.
    """
    share = recovered(before["reference"], before["quantized"], after, seed=seed)
    ratio = perplexity_ratio(before["quantized"], after, seed=seed)
    return {
        "reference": perplexity(before["reference"]),
        "quantized": perplexity(before["quantized"]),
        "corrected": perplexity(after),
        "recovered": share.value,
        "recovered_ci95": [share.low, share.high],
        "ppl_ratio": ratio.value,
        "ppl_ratio_ci95": [ratio.low, ratio.high],
        "kl_quantized": float(before["quantized"].kl.mean()),
        "kl_corrected": float(after.kl.mean()),
        "groups": len(correction.ranks),
        "overhead": correction.overhead,
    }
