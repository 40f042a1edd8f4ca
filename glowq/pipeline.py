"""`correct()`: checkpoint -> groups -> moments -> factors -> correction, block by block."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from . import __version__
from .backends import check_scales, is_calibrated, prepare_model, refuse_misloaded, stored_base
from .backends.dense import origin, take
from .block_solver import BlockSolver, stops_of, to_model
from .config import GlowQConfig
from .correction import Correction, describe_groups
from .data import batches, read_texts, token_sequences
from .errors import (
    CalibrationError,
    ConfigError,
    NoGradientWarning,
    SensitivityError,
    TokenizerMismatchError,
    UnsupportedModuleError,
)
from .fingerprint import fingerprint
from .groups import Trace, trace_groups
from .methods import Method, get_method
from .reference import REVISION_TOLERANCE, Reference
from .resume import Resume
from .runtime import attach, attached, detach, factor_dtype
from .selection import RankRequest, candidate_ranks, uniform_ranks
from .sensitivity import output_moments

__all__ = ["calibration_sequences", "correct"]

_TRACE_TOKENS = 8
_GRADIENT_TOKENS = 16384
_GRADIENT_BATCH = 512  # tokens a backward pass, which keeps the activations of all of them
_DENSE_TOLERANCE = 0.5  # GGUF quantizes the embeddings too: 4 bits make 0.1, an unrelated model 1.4


def correct(
    model: nn.Module,
    *,
    reference: Any,
    calibration: Any = None,
    tokenizer: Any = None,
    rank: int | None = None,
    budget: str | int | None = None,
    rank_step: int = 1,
    max_rank: int | None = None,
    method: str = "glowq",
    calibration_tokens: int = 32768,
    sequence_length: int = 512,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    dense: bool = False,
) -> Correction:
    """Give a quantized model its accuracy back, and return what was added as a `Correction`.

    The model itself is corrected in place: it computes y = Q x + A (B x) afterwards (`glowq.detach` undoes it), and
    its own `save_pretrained` writes the self-contained form.

    Args:
        model: quantized transformers model.
        reference: the full-precision model that it was made from: a Hub name, a folder, or a model in memory.
        calibration: text (list of str, file, folder or datasets name), or token ids as a tensor of shape (n, length).
        tokenizer: turns the text into ids; needed unless `calibration` is a tensor.
        rank: rank of every group (lowered where a group allows less); 32 if neither it nor `budget` is given.
        budget: instead of `rank`: the ranks that gain most within these bytes, a share of the quantized weights
            ("1%") or a size ("200MB"); or the share of the predicted loss that the fewest bytes are to recover
            ("recover 80%").
        rank_step: a budget buys ranks in multiples of this, or all that a group's shape allows.
        max_rank: most ranks that a budget buys any group.
        method: see `glowq.methods`.
        calibration_tokens: how many tokens of the text are used, picked from all over it.
        sequence_length: tokens a sequence; lowered to what the model allows.
        seed: of that choice and of the solver.
        resume: folder that keeps finished blocks, so that an interrupted run goes on where it stopped.
        dense: correct plain float weights that hold quantized values: those of a GGUF, float8 or mxfp4 file that was
            dequantized on load, or fake-quantized ones. Every linear layer but the head is taken.

    Returns:
        The correction, attached to `model`, its factors in the model's dtype on the CPU.

    Raises:
        BackendError: transformers could not read the weights of the model's checkpoint.
        UnsupportedModuleError: the model holds no quantized linear module, or none that can be corrected.
        ReferenceMismatchError: modules, shapes or embeddings of the reference are others.
        FoldingError: scales were folded into the quantized weights that no layer takes out again.
        CalibrationError: no text, or fewer tokens than needed.
        RankError: rank below 1, or larger than every group allows.
        ConfigError: the budget cannot be parsed, is too small for any rank, or is a target out of reach of the ranks
            that a tenth of the quantized weights' bytes would have been spent on.
        NonFiniteError: NaN or Inf in a weight or in an activation; the message names the module.
    """
    solver = get_method(method)
    request = RankRequest(rank, budget, rank_step, max_rank)
    if attached(model):
        raise ConfigError("the model carries a correction already; call glowq.detach(model) first.")
    refuse_misloaded(model)
    if dense:
        take(model)
    backends = prepare_model(model)
    if not backends:
        raise UnsupportedModuleError(_nothing_quantized(model))
    check_scales(model)
    sequences = calibration_sequences(model, calibration, tokenizer, calibration_tokens, sequence_length, seed)
    trace = _trace(model, sequences)
    base_bytes = sum(backend.packed_bytes(model.get_submodule(name)) for name, backend in backends.items())
    itemsize = factor_dtype(model).itemsize
    if budget is None:
        ranks = uniform_ranks(trace.groups, rank)
    else:
        ranks = candidate_ranks(trace.groups, request, base_bytes, itemsize, shared=solver.shared)
    _check_token_count(sequences, ranks)
    config = _stored_config(model, reference, base_bytes, solver, sequences, seed)
    try:
        with Reference(reference, type(model)) as source:
            source.check({name: shape for group in trace.groups for name, shape in group.shapes.items()})
            source.check_revision(model, _DENSE_TOLERANCE if dense else REVISION_TOLERANCE)
            store = Resume.open(resume, config, reference, ranks, sequences)
            outputs = _output_moments(model, source.model, trace, sequences, seed) if solver.two_sided else {}
            config.provenance["gains"] = "nats" if outputs else "squared output"
            run = BlockSolver(model, source, backends, solver, ranks, seed, store, outputs)
            factors = run.solve(stops_of(trace, ranks), sequences)
    except BaseException:
        detach(model)
        raise
    config.provenance["total"] = math.fsum(entry.total for entry in factors)  # known still when groups are cut away
    correction = Correction(
        factors=factors,
        config=config.with_groups(describe_groups(factors)),
        model_config=_model_config(model),
        base_bytes=base_bytes,
        tokenizer=tokenizer,
        generation_config=getattr(model, "generation_config", None),
        base_is_stored=pre_quantized(model) or not is_calibrated(config.base),
    )
    return correction if budget is None else _cut_attached(model, correction, request)


def _cut_attached(model: nn.Module, correction: Correction, request: RankRequest) -> Correction:
    """The correction at the ranks that a budget buys, attached in place of the whole one."""
    detach(model)
    chosen = correction.cut(budget=request.budget, rank_step=request.rank_step, max_rank=request.max_rank)
    for entry in chosen.factors:
        attach(model, entry)
    return chosen


def _output_moments(
    model: nn.Module, reference: nn.Module, trace: Trace, sequences: Tensor, seed: int
) -> dict[str, Tensor]:
    """How much the loss minds each group's outputs: by the model's own gradients, else by the reference's.

    Empty, with one word, where neither has any.
    """
    chosen = sequences[: max(1, _GRADIENT_TOKENS // sequences.shape[1])]
    inputs = [to_model(batch, model) for batch in batches(chosen, max(1, _GRADIENT_BATCH // sequences.shape[1]))]
    refusals = []
    for candidate in (model, reference):
        try:
            return output_moments(candidate, trace.groups, inputs, seed=seed)
        except SensitivityError as error:
            refusals.append(error)
    warnings.warn(
        f"{refusals[0]} Errors are counted in output units instead of in loss, which spends a budget less well.",
        NoGradientWarning,
        stacklevel=3,
    )
    return {}


def _nothing_quantized(model: nn.Module) -> str:
    found, method = f"{type(model).__name__} holds no quantized linear module", origin(model)
    if method is None:
        return (
            f"{found}: there is nothing to correct. Quantize it first, for example with GlowQConfig(base='nf4'); if "
            "its float weights hold quantized values, pass dense=True (--base dense) to correct them as they are."
        )
    return (
        f"{found}: its {method} weights were dequantized on load. Pass dense=True (--base dense) to correct the "
        "dequantized weights as they are, or load the model with a quantizer that keeps them packed."
    )


def pre_quantized(model: nn.Module) -> bool:
    """Whether the model was loaded from quantized weights rather than quantized while loading."""
    return bool(getattr(getattr(model, "hf_quantizer", None), "pre_quantized", True))


def calibration_sequences(
    model: nn.Module, calibration: Any, tokenizer: Any, tokens: int, length: int, seed: int
) -> Tensor:
    """The token ids that a correction is made of, int64, shape (n, length); see `correct` for the arguments.

    Raises:
        CalibrationError: no text, no tokenizer, or fewer tokens than one sequence.
        TokenizerMismatchError: ids that the model does not know.
    """
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if config is not None else None
    vocab_size = getattr(text_config, "vocab_size", None)
    limit = getattr(text_config, "max_position_embeddings", None) or length
    if isinstance(calibration, Tensor):
        if calibration.dim() != 2 or calibration.is_floating_point() or calibration.numel() == 0:
            raise CalibrationError(
                f"calibration token ids must be whole numbers of shape (n, length), found {calibration.dtype} of shape "
                f"{tuple(calibration.shape)}."
            )
        if vocab_size is not None and int(calibration.max()) >= vocab_size:
            raise TokenizerMismatchError(
                f"the calibration tokens hold id {int(calibration.max())}, the model knows 0 to {vocab_size - 1}; "
                "use the model's own tokenizer."
            )
        return calibration
    if calibration is None:
        raise CalibrationError("no calibration text: pass calibration= a list of str, a file, or a datasets name.")
    if tokenizer is None:
        raise CalibrationError("calibration text needs a tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...).")
    return token_sequences(
        read_texts(calibration), tokenizer, length=min(length, limit), limit=tokens, seed=seed, vocab_size=vocab_size
    )


def _trace(model: nn.Module, sequences: Tensor) -> Trace:
    example = to_model({"input_ids": sequences[:1, :_TRACE_TOKENS]}, model)
    trace = trace_groups(model, example)
    if not trace.groups:
        name, reason = next(iter(trace.skipped.items()))
        raise UnsupportedModuleError(f"no module can be corrected; {name}: {reason}.")
    return trace


def _check_token_count(sequences: Tensor, ranks: Mapping[str, int]) -> None:
    needed = 2 * max(ranks.values())
    if sequences.numel() < needed:
        raise CalibrationError(
            f"{sequences.numel()} calibration tokens are too few for rank {max(ranks.values())}: at least {needed} are "
            "needed, and some ten thousand are better. Give longer text or a smaller rank."
        )


def _stored_config(
    model: nn.Module,
    reference: Any,
    base_bytes: int,
    method: Method,
    sequences: Tensor,
    seed: int,
) -> GlowQConfig:
    base = getattr(getattr(model, "config", None), "quantization_config", None)
    name, revision = base_identity(model, reference)
    return GlowQConfig(
        base=stored_base(base.base if isinstance(base, GlowQConfig) else base),
        method=method.name,
        seed=seed,
        format="correction",
        base_model={"name": name, "revision": revision, "fingerprint": fingerprint(model)},
        groups={},
        base_bytes=base_bytes,
        provenance={
            "glowq": __version__,
            "calibration_tokens": int(sequences.numel()),
            "sequence_length": int(sequences.shape[1]),
        },
    )


def base_identity(model: nn.Module, reference: Any) -> tuple[str, str | None]:
    """Where the base can be loaded from again: the quantized model's own folder or Hub name, and the cached commit."""
    config: Any = getattr(model, "config", None)
    earlier = getattr(config, "quantization_config", None)
    if isinstance(earlier, GlowQConfig) and earlier.base_model is not None:
        # Loaded with a correction that was detached: its folder is no base.
        return earlier.base_model["name"], earlier.base_model["revision"]
    name = getattr(config, "_name_or_path", "") or (reference if isinstance(reference, str) else "")
    if not name:
        raise ConfigError("the model does not know where it was loaded from; load it with from_pretrained.")
    if Path(name).is_file():
        name = str(Path(name).parent)  # HQQ's own loader names the config.json
    if Path(name).is_dir():
        return str(Path(name).resolve()), None
    cached = try_to_load_from_cache(str(name), "config.json")
    return str(name), Path(cached).parent.name if isinstance(cached, str) else None


def _model_config(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    stored = dict(config.to_dict())
    stored.pop("quantization_config", None)
    stored.pop("_name_or_path", None)
    stored["architectures"] = [type(model).__name__]
    return stored
