"""How much a correction changes the answers of its model: recorded when it is made, and compared by `glowq verify`."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import CorrectionError, NonFiniteError, SensitivityError
from ..models.forward import REFUSALS, evaluating, input_shape
from ..models.samples import is_encoder_decoder
from ..runtime.switching import disabled
from .divergence import answer, divergences

__all__ = ["answer_change", "check_change"]

_SHAPE = (2, 16)  # shape of the random token ids that the model is run on
_ALLOWED = 2.0  # another dtype, device or kernel changes the figure by some percent
_ROUNDING = 1e-5  # changes below it are rounding errors of bfloat16


@torch.no_grad()
def answer_change(model: Any) -> float | None:
    """The mean divergence between the answers with and without the correction, to fixed random inputs.

    Args:
        model: a corrected model.

    Returns:
        Nats a token, or squared distance a sequence for an encoder; None if it is not known what the model can be run
        on, or if its outputs cannot be compared.

    Raises:
        NonFiniteError: the answers hold NaN or Inf.
    """
    inputs = _random_inputs(model)
    if inputs is None:
        return None
    with evaluating(model):
        try:
            corrected = answer(model(**inputs))
        except (SensitivityError, *REFUSALS):
            return None
        with disabled(model):
            plain = answer(model(**inputs))
    if not all(bool(torch.isfinite(part).all()) for part in (*corrected, *plain)):
        raise NonFiniteError("the model runs, but its answers hold NaN or Inf: a weight or a factor is damaged.")
    return max(0.0, float(divergences(plain, corrected).mean()))  # rounding can make a divergence of zero negative


def _random_inputs(model: Any) -> dict[str, Any] | None:
    """Token ids, or what else the model reads, from a fixed seed; None if its config does not say enough."""
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    generator = torch.Generator().manual_seed(0)
    main = getattr(model, "main_input_name", "input_ids")
    inputs: dict[str, Any] = {}
    if main not in ("input_ids", "inputs_embeds"):
        shape = input_shape(main, model.config)
        if shape is None:
            return None
        inputs[main] = torch.randn(shape, generator=generator).to(model.device, model.dtype)
    elif vocabulary is None:
        return None
    else:
        inputs["input_ids"] = torch.randint(vocabulary, _SHAPE, generator=generator).to(model.device)
    if is_encoder_decoder(model) and vocabulary is not None:
        rows = len(next(iter(inputs.values())))
        ids = torch.randint(vocabulary, (rows, _SHAPE[1]), generator=generator)
        inputs["decoder_input_ids"] = ids.to(model.device)
    return inputs


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
