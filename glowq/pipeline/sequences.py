"""What a correction is made of: read, checked, and split into calibration and held-out sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..artifact.request import CorrectionRequest
from ..data.ids import holds_ids, id_sequences
from ..data.inputs import Inputs, Samples, SomeSamples, split
from ..data.read_inputs import holds_inputs, peeked, read_inputs
from ..data.text import check_source
from ..data.tokens import sequences_of
from ..errors import CalibrationError
from ..factors.form import bits_of
from ..models.positions import position_limit
from ..models.samples import checked_samples, is_encoder_decoder, refuse_text, with_decoder
from ..selection.budget import RankRequest
from ..solving.methods.base import Method

__all__ = [
    "TOKENS_PER_RANK",
    "calibration_sequences",
    "check_token_count",
    "checked_ids",
    "split_sequences",
    "unmeasured",
]

TOKENS_PER_RANK = 2
"""Fewest calibration tokens for each rank of a group."""

_SELECTION_TOKENS = 2048  # tokens on which all groups are measured
_SELECTED = 1 / 8  # largest share of the sequences that may be used for this measurement


def calibration_sequences(model: nn.Module, request: CorrectionRequest, tokenizer: Any) -> Samples:
    """The token ids to calibrate on, int64, shape (n, length), or samples of another kind; see `CorrectionRequest`.

    Raises:
        CalibrationError: no text, no tokenizer, or fewer tokens than one sequence; or token ids that are no whole
            numbers, negative, or of sequences that are longer than the model has positions for; or samples that the
            model does not take.
        TokenizerMismatchError: an id is outside the model's vocabulary.
    """
    calibration, decodes = peeked(request.calibration), is_encoder_decoder(model)
    if calibration is None:
        raise CalibrationError("no calibration text: pass calibration= a list of str, a file, or a datasets name.")
    if isinstance(calibration, Inputs):
        return calibration
    if holds_inputs(calibration) or (decodes and isinstance(calibration, Mapping) and "labels" in calibration):
        tokens = None if isinstance(calibration, Mapping | Sequence) else request.calibration_tokens
        return checked_samples(model, read_inputs(calibration), _vocab_size(model), tokens)
    refuse_text(model)
    ids = _ids(model, request, tokenizer, calibration)
    return with_decoder(model, ids) if decodes else ids


def _ids(model: nn.Module, request: CorrectionRequest, tokenizer: Any, calibration: Any) -> Tensor:
    if holds_ids(calibration):
        return checked_ids(model, calibration)
    check_source(calibration)
    if tokenizer is None:
        raise CalibrationError("calibration text needs a tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...).")
    length, positions = request.sequence_length, position_limit(model)
    return sequences_of(
        calibration,
        tokenizer,
        length=length if positions is None else min(length, positions),
        limit=request.calibration_tokens,
        seed=request.seed,
        vocab_size=_vocab_size(model),
    )


def checked_ids(model: nn.Module, source: Any) -> Tensor:
    """Token ids that a user gives for this model, int64, shape (n, length), see `glowq.data.ids.id_sequences`.

    Raises:
        CalibrationError, TokenizerMismatchError: see `calibration_sequences`.
    """
    return id_sequences(source, vocab_size=_vocab_size(model), positions=position_limit(model))


def _vocab_size(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    return None if config is None else getattr(config.get_text_config(), "vocab_size", None)


def split_sequences(
    sequences: SomeSamples, method: Method, request: RankRequest, factor_dtype: str, seed: int
) -> tuple[SomeSamples, SomeSamples | None]:
    """Split the sequences into a part for calibration, and a part on which groups and the correction are measured.

    The second part is None if there is only one sequence and nothing has to be measured.
    """
    needed = bits_of(factor_dtype) is not None or (request.budget is not None and method.allocation == "gain")
    if len(sequences) < 2 and not needed:
        return sequences, None
    try:
        return _split(sequences, seed)
    except CalibrationError as error:
        if bits_of(factor_dtype) is None:
            raise
        raise CalibrationError(
            f"{factor_dtype} factors are measured on text that the factors are not calibrated on: {error}"
        ) from error


def unmeasured(sequences: SomeSamples, seed: int) -> SomeSamples:
    """The sequences that `split_sequences` does not measure on.

    A base that is quantized with calibration text takes only these: its error is smaller on text that it has seen.
    """
    return sequences if len(sequences) < 2 else _split(sequences, seed)[0]


def _split(sequences: SomeSamples, seed: int) -> tuple[SomeSamples, SomeSamples]:
    return split(sequences, min(_SELECTED, _SELECTION_TOKENS / sequences.numel()), seed)


def check_token_count(sequences: Samples, ranks: Mapping[str, int]) -> None:
    """Refuse fewer than `TOKENS_PER_RANK` calibration tokens per rank.

    Args:
        sequences: token ids to calibrate on, shape (n, length), or samples of another kind.
        ranks: group name -> rank to solve.

    Raises:
        CalibrationError: the message says how many tokens are needed.
    """
    needed = TOKENS_PER_RANK * max(ranks.values())
    if sequences.numel() < needed:
        raise CalibrationError(
            f"{sequences.numel()} calibration tokens are too few for rank {max(ranks.values())}: at least {needed} are "
            "needed, and some ten thousand are better. Give longer text or a smaller rank."
        )
