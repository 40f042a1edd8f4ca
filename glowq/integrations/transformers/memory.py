"""Correct a model in memory, or attach a saved correction to it, so that transformers can save the two together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

from torch import nn
from transformers.quantizers.base import HfQuantizer

from ...artifact.config import GlowQConfig
from ...artifact.correction import Correction
from ...artifact.fingerprint import verify_fingerprint
from ...errors import ConfigError
from ...factors.factors import GroupFactors
from ...models.wrappers import correctable
from ...pipeline import correct as pipeline
from ...quantizers.loading.dense import adopt_dense
from ...quantizers.model import check_scales, prepare_model
from ...quantizers.registry import method_of, stored_base
from ...quantizers.settings import base_settings
from ...runtime.attach import attach, attached, factor_dtype
from .class_names import in_class, with_fingerprint
from .delegation import LibraryHfQuantizer
from .saving import CorrectedHfQuantizer

__all__ = ["adopt", "attach_all", "base_of", "correct", "drop_irreversible_conversions", "load_correction"]

_P = ParamSpec("_P")


def _adopting(solve: Callable[_P, Correction]) -> Callable[_P, Correction]:
    @wraps(solve)
    def correct(*args: _P.args, **kwargs: _P.kwargs) -> Correction:
        correction = solve(*args, **kwargs)
        adopt(correctable(args[0] if args else kwargs["model"]), correction.config)
        return correction

    return correct


correct = _adopting(pipeline.correct)  # this is `glowq.correct`; the model's `save_pretrained` then stores the factors


def load_correction(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    budget: str | int | None = None,
    rank_step: int = 1,
    max_rank: int | None = None,
    **hub_kwargs: Any,
) -> Correction:
    """Attach a saved correction to a quantized model that is already in memory.

    Args:
        model: the correction's base: a quantized model, or one that was dequantized while loading. A compiled model is
            compiled again at its next call.
        path: a folder that `Correction.save_pretrained` wrote, or a Hub name.
        budget: cut the correction to a share of the quantized weights' bytes ("1%"), to a size ("200MB"), or to the
            ranks that recover a share of the predicted loss ("recover 80%"). Only the ranks that are kept are read.
        rank_step, max_rank: limits of that cut, see `Correction.cut`.
        **hub_kwargs: passed on to `Correction.from_pretrained`, e.g. `revision`, `token`.

    Returns:
        The attached correction.

    Raises:
        CorrectionError: corrupt files, or a factor is missing, extra or misshaped.
        FingerprintError: the correction was made for other quantized weights.
        UnsupportedModuleError: `model` is not a model, carries a PEFT adapter, or is inside of another module.
        ConfigError: the model carries a correction already; or the budget is too small, larger than the correction, or
            a share that cannot be recovered; or the correction holds no measured gains.
    """
    model = correctable(model)
    correction = Correction.from_pretrained(path, budget=budget, rank_step=rank_step, max_rank=max_rank, **hub_kwargs)
    base_settings(correction.config.base)  # raises if the base's library is not installed
    if attached(model):
        raise ConfigError("the model carries a correction already; call glowq.detach(model) first.")
    if method_of(correction.config.base) == "dense":
        adopt_dense(model)
    prepare_model(model)
    made_for = correction.model_config.get("architectures") or [type(model).__name__]
    attach_all(model, correction.config, correction.factors, type(model).__name__ not in made_for)
    return correction


def adopt(model: nn.Module, config: GlowQConfig) -> None:
    """Make `save_pretrained` of a model with an attached correction write both the base and the correction."""
    base = getattr(model, "hf_quantizer", None) or LibraryHfQuantizer()
    model_config: Any = model.config
    stored = config.with_format("full")
    stored.base = base_of(model, getattr(base, "quantization_config", stored.base))
    if isinstance(base, CorrectedHfQuantizer):
        base.glowq_config = stored
    elif isinstance(base, HfQuantizer):
        kind: Any = CorrectedHfQuantizer  # Any, because mypy sees abstract methods, which are delegated to the base
        quantizer = kind.__new__(kind)
        quantizer.base = base
        quantizer.glowq_config = stored
        quantizer.quantization_config = stored.base
        quantizer.pre_quantized = base.pre_quantized
        model.hf_quantizer = quantizer
    # Without a config of the base, the base's library saves the model, and config.json must not name glowq.
    if stored.base is not None:
        model_config.quantization_config = stored
    drop_irreversible_conversions(model)


def base_of(model: nn.Module, fallback: Any) -> Any:
    """The base's quantization config, as its library left it in the model's config, without its calibration text."""
    found = getattr(model.config, "quantization_config", None)
    base = fallback if found is None or isinstance(found, (GlowQConfig, dict)) else found
    return stored_base(base)


def attach_all(model: nn.Module, config: GlowQConfig, factors: Sequence[GroupFactors], other_class: bool) -> None:
    """Attach a saved correction to its base.

    Args:
        model: the base, prepared by `prepare_model`, without a correction.
        config: description of the correction.
        factors: its factors.
        other_class: whether it was made for another class of model than this one.

    Raises:
        NonFiniteError: a scale of the base holds NaN or Inf.
        FingerprintError: the correction was made for other quantized weights.
    """
    check_scales(model)
    if other_class:
        config, factors = in_class(model, config, factors)
    verify_fingerprint(model, config, other_class)
    if other_class:
        config = with_fingerprint(model, config)
    for entry in factors:
        attach(model, entry, dtype=factor_dtype(model))
    adopt(model, config)


def drop_irreversible_conversions(model: nn.Module) -> None:
    """Remove the base's load conversions: transformers cannot reverse them, so saving the model would raise."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [  # type: ignore[assignment]
            conversion
            for conversion in conversions
            if not any(getattr(op, "hf_quantizer", None) is not None for op in getattr(conversion, "operations", ()))
        ]
