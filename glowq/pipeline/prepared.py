"""The steps before a model is corrected: check that its weights can be read, find its groups, open its reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..data.inputs import Inputs, Samples, batches
from ..errors import UnsupportedModuleError
from ..models.forward import REFUSALS, to_model
from ..models.reference import Reference
from ..models.reference_checks import REVISION_TOLERANCE, check_loaded, check_revision
from ..models.samples import refuse_text
from ..models.tracing import UNREACHED, Trace, trace_groups
from ..models.wrappers import uncompiled
from ..quantizers.base import Backend
from ..quantizers.loading.dense import adopt_dense, dequantized_from
from ..quantizers.model import check_scales, prepare_model, refuse_misloaded
from ..quantizers.registry import methods

__all__ = ["examples", "opened", "readable_modules", "traced"]

_TRACE_TOKENS = 8
_MORE = 8  # sequences
_DENSE_TOLERANCE = 0.5  # GGUF also quantizes the embeddings: 4 bits change them by 0.1; another model differs by 1.4


def readable_modules(model: nn.Module, dense: bool) -> dict[str, Backend]:
    """Prepare the quantized modules of a model, and return name -> backend, at least one.

    Args:
        model: changed as `prepare_model` says.
        dense: see `glowq.correct`.

    Raises:
        UnsupportedModuleError: the model holds no quantized linear module.
        BackendError, NonFiniteError: see `refuse_misloaded` and `check_scales`.
    """
    refuse_misloaded(model)
    if dense:
        adopt_dense(model)
    backends = prepare_model(model)
    if not backends:
        raise UnsupportedModuleError(_nothing_quantized(model))
    check_scales(model)
    return backends


def traced(model: nn.Module, sequences: Samples) -> Trace:
    """Find the groups of a model, from a forward of the first tokens, or of the first sample of another kind.

    If it does not reach every module, which may be experts, more text is tried.

    Raises:
        UnsupportedModuleError: no module can be corrected.
        CalibrationError: the sequences are text, and the model also needs an image or a sound.
    """
    try:
        trace = _traced(model, sequences)
    except REFUSALS:
        if not isinstance(sequences, Inputs):
            refuse_text(model, failed=True)
        raise
    if not trace.groups:
        name, reason = next(iter(trace.skipped.items()))
        raise UnsupportedModuleError(f"no module can be corrected; {name}: {reason}.")
    return trace


def _traced(model: nn.Module, sequences: Samples) -> Trace:
    """Trace more and more text, as long as it does not reach all modules, and more text reaches more of them."""
    trace, before = None, None
    for example in examples(sequences):
        trace = trace_groups(model, to_model(example, model))
        unreached = [name for name, reason in trace.skipped.items() if reason in UNREACHED]
        if not unreached or unreached == before:
            break
        before = unreached
    assert trace is not None
    return trace


def examples(sequences: Samples) -> Iterator[dict[str, Any]]:
    """Keyword arguments of longer and longer forwards; a sample of another kind than text is not cut."""
    if isinstance(sequences, Inputs):
        yield dict(sequences.samples[0])
    else:
        yield {"input_ids": sequences[:1, :_TRACE_TOKENS]}
        yield next(iter(batches(sequences, 1)))
    yield next(iter(batches(sequences, _MORE)))


@contextmanager
def opened(
    reference: Any, model: nn.Module, trace: Trace, sequences: Samples, *, dense: bool, variant: str | None = None
) -> Iterator[Reference]:
    """Open the reference of a model, and check that the model was made from it. Compiled parts run uncompiled inside.

    Args:
        reference, dense, variant: see `glowq.correct`.
        model: the quantized model.
        trace: its groups.
        sequences: token ids that both models will run on, int64, or samples of another kind.

    Raises:
        ReferenceMismatchError, UnsupportedModuleError, CalibrationError: see the checks of `Reference`.
    """
    with (
        uncompiled(),
        Reference(reference, type(model), getattr(model, "device", None), fresh=model, variant=variant) as source,
    ):
        source.check({name: shape for group in trace.groups for name, shape in group.shapes.items()})
        source.check_ids(sequences)
        check_revision(model, source.model, _DENSE_TOLERANCE if dense else REVISION_TOLERANCE)
        check_loaded(model, source.model)
        source.check_runs(next(examples(sequences)))
        yield source


def _nothing_quantized(model: nn.Module) -> str:
    found, method = f"{type(model).__name__} holds no quantized linear module", dequantized_from(model)
    if method is None:
        return (
            f"{found}: there is nothing to correct. Quantize it first, for example with GlowQConfig(base='nf4'); if "
            "its float weights hold quantized values, pass dense=True (--base dense) to correct them as they are."
        )
    if method in methods() and getattr(model.config, "quantization_config", None) is not None:
        return (
            f"{found}: its config names {method}, which left every linear layer as it is (its list of modules to skip, "
            "llm_int8_skip_modules or modules_to_not_convert, may name all). Quantize some, or pass dense=True (--base "
            "dense) if its float weights hold quantized values."
        )
    return (
        f"{found}: its {method} weights were dequantized on load. Pass dense=True (--base dense) to correct the "
        "dequantized weights as they are, or load the model with a quantizer that keeps them packed."
    )
