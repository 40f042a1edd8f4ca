"""How much a correction changes the answers of its model: recorded when it is made, and compared by `glowq verify`."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import CorrectionError, NonFiniteError, SensitivityError
from ..models.forward import evaluating
from ..runtime.switching import disabled
from .divergence import answer, divergences

__all__ = ["answer_change", "check_change"]

_SHAPE = (2, 16)  # shape of the random token ids that the model is run on
_ALLOWED = 2.0  # another dtype, device or kernel changes the figure by some percent
_ROUNDING = 1e-5  # changes below it are rounding errors of bfloat16


@torch.no_grad()
def answer_change(model: Any) -> float | None:
    """The mean divergence between the answers with and without the correction, to fixed random tokens.

    Args:
        model: a corrected model.

    Returns:
        Nats a token, or squared distance a sequence for an encoder; None if the model cannot be run on token ids alone,
        or if its outputs cannot be compared.

    Raises:
        NonFiniteError: the answers hold NaN or Inf.
    """
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if vocabulary is None:
        return None
    ids = torch.randint(vocabulary, _SHAPE, generator=torch.Generator().manual_seed(0)).to(model.device)
    with evaluating(model):
        try:
            corrected = answer(model(input_ids=ids))
        except (SensitivityError, ValueError):  # ValueError: transformers asks for other inputs
            return None
        with disabled(model):
            plain = answer(model(input_ids=ids))
    if not all(bool(torch.isfinite(part).all()) for part in (*corrected, *plain)):
        raise NonFiniteError("the model runs, but its answers hold NaN or Inf: a weight or a factor is damaged.")
    return max(0.0, float(divergences(plain, corrected).mean()))  # rounding can make a divergence of zero negative


def check_change(found: float, recorded: float) -> None:
    """Compare the change of a loaded model with that of the model that was corrected.

    Raises:
        CorrectionError: they differ by more than another dtype or kernel explains.
    """
    small, large = sorted((found, recorded))
    if large > max(_ALLOWED * small, _ROUNDING):
        raise CorrectionError(
            f"the correction changes the answers by {found:.3g}, and did by {recorded:.3g} when it was made: the "
            "weights of the base or the factors are not what they were. Download both again, or correct again."
        )
