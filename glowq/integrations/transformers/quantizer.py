"""The transformers quantizer of corrected models: it delegates to the base's quantizer and adds the correction.

`hf_quantizer.quantization_config` is the base's config, because transformers, PEFT and accelerate read its
`quant_method`. `GlowQConfig` is in `model.config.quantization_config`. glowq reads the factors itself, because the
weight loader of transformers only warns about a missing tensor and leaves its memory uninitialized.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

from ...artifact.base_files import (
    base_folder,
    base_shards,
    check_same_model,
    model_shards,
    original_tensors,
    refuse_unsafe,
)
from ...artifact.config import GlowQConfig
from ...artifact.correction import Correction
from ...artifact.factor_files import FACTOR_KEYS, factor_tensors, read_factors, with_checksums
from ...artifact.fingerprint import verify_fingerprint
from ...artifact.request import CorrectionRequest
from ...errors import ConfigError, CorrectionError
from ...factors.factors import GroupFactors
from ...models.model_config import read_model_config
from ...models.wrappers import correctable
from ...pipeline import correct as pipeline
from ...pipeline.sequences import calibration_sequences
from ...quantizers.libraries.dense import adopt_dense
from ...quantizers.model import check_scales, prepare_model, quantized_modules
from ...quantizers.registry import (
    backend_of,
    check_installed,
    is_calibrated,
    method_of,
    stored_base,
    with_calibration,
)
from ...quantizers.settings import base_settings
from ...runtime.attach import attach, attached, attached_factors, factor_dtype, set_aside
from ...runtime.fast_kernels import refuse_rewritten
from .delegation import DelegatingHfQuantizer, LibraryHfQuantizer, Refusal
from .merge import merge_into_dense

__all__ = ["GlowQHfQuantizer", "adopt", "correct", "load_correction"]

_P = ParamSpec("_P")


class GlowQHfQuantizer(DelegatingHfQuantizer):
    """Delegates to the base's quantizer, and attaches the correction; see the docstring of this module."""

    requires_calibration = False
    _base_folder: Path | None = None  # folder of the base, if the correction is stored without its base
    _shards: Sequence[str] = ()  # the files that the weight loader reads
    _factors: Sequence[GroupFactors] = ()  # read from the files, attached after the base is loaded
    _calibration: Any = None  # text or token ids to correct with while loading

    def __init__(self, quantization_config: GlowQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        config = quantization_config
        if self.pre_quantized and not config.is_stored:
            raise CorrectionError(
                "the config.json of this model names glowq and holds no groups of a correction; download or correct "
                "again. A request for a correction is given to from_pretrained, and is never taken from a file."
            )
        if config.base is None and config.is_stored:
            raise ConfigError(
                "no config.json says how this correction's base is quantized, so transformers cannot load it. Load the "
                "base with the library that quantized it, then call glowq.load_correction(model, path)."
            )
        if config.base is None:
            raise ConfigError(
                "GlowQConfig needs a base quantizer: base='nf4', or a transformers quantization config. For a model "
                "that is quantized already, load it first, then call glowq.correct or glowq.load_correction."
            )
        calibration = None if config.request is None else config.request.calibration
        if not config.is_stored and calibration is None and config.correction is None:
            raise ConfigError("GlowQConfig needs calibration text, or the correction to attach.")
        self.glowq_config = config
        if config.is_stored and config.format == "correction":
            self._base_folder = base_folder(config)
            base_config = read_model_config(self._base_folder / "config.json")
            self.pre_quantized = base_config.get("quantization_config") is not None
        self._calibration = calibration
        self._use(base_settings(config.base))
        if not self.pre_quantized and calibration is None and is_calibrated(self.quantization_config):
            raise ConfigError(
                f"{method_of(config.base)} needs text to quantize, and a correction holds no text: quantize the model "
                "first, save it, and load the saved folder instead."
            )

    def _use(self, base: Any) -> None:
        """From now on, delegate to the quantizer of the quantization config `base`."""
        backend = backend_of(base)
        if backend is not None:
            check_installed(backend, f"a {method_of(base)} model")
        self.base = AutoHfQuantizer.from_config(base, pre_quantized=self.pre_quantized)
        self.quantization_config = base

    def preprocess_model(
        self, model: PreTrainedModel, dtype: Any = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Read stored factors, make the weight loader read the base's shards, and run the base's own preprocessing."""
        if checkpoint_files is None:
            raise ConfigError("glowq corrects checkpoints: load the model with from_pretrained(name_or_path).")
        refuse_unsafe(checkpoint_files, model.config.name_or_path, self.glowq_config)
        if self.glowq_config.is_stored:
            self._factors = read_factors([Path(file) for file in checkpoint_files], self.glowq_config.groups or {})
            ignored = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = {*ignored, FACTOR_KEYS}
        if self._base_folder is not None:
            check_same_model(self._base_folder, model.config)
            # Changed in place, because the weight loader reads this list object.
            checkpoint_files[:] = base_shards(self._base_folder)
        self._shards = list(checkpoint_files)
        if not self.pre_quantized and is_calibrated(self.quantization_config):
            self._quantize_with_calibration(model)
        self.base.preprocess_model(model, dtype, checkpoint_files=checkpoint_files, **kwargs)

    def postprocess_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Run the base's own postprocessing, make its modules safe to read and run, and attach the correction.

        The correction comes from the loaded files, from the folder or Hub name in `GlowQConfig`, or is computed now.
        """
        self.base.postprocess_model(model, **kwargs)
        self.quantization_config = _base_of(model, self.quantization_config)
        prepare_model(model)
        _drop_irreversible_conversions(model)
        config = self.glowq_config
        if config.is_stored:
            factors, self._factors = self._factors, ()
            _attach_all(model, config, factors)
        elif config.correction is not None:
            cut = self._request().ranks
            load_correction(model, config.correction, budget=cut.budget, rank_step=cut.rank_step, max_rank=cut.max_rank)
        else:
            self._correct_now(model)
        return model

    def _quantize_with_calibration(self, model: nn.Module) -> None:
        """Let the base calibrate its quantization on the same sequences as the correction."""
        from transformers import AutoTokenizer

        name = model.config.name_or_path  # type: ignore[union-attr]
        with torch.device("cpu"):  # transformers creates tensors on the meta device at this point
            tokenizer = AutoTokenizer.from_pretrained(name)
            self._calibration = calibration_sequences(model, self._request(), tokenizer)
        self._use(with_calibration(self.quantization_config, self._calibration))

    def _correct_now(self, model: nn.Module) -> None:
        from transformers import AutoTokenizer

        source = str(model.config.name_or_path)  # type: ignore[union-attr]
        folder = Path(self._shards[0]).parent
        # In the Hub's cache, the folder of a snapshot is named after its commit.
        revision = folder.name if folder.parent.name == "snapshots" and not os.path.isdir(source) else None
        correct(
            model,
            reference=folder if (folder / "config.json").is_file() else source,
            tokenizer=AutoTokenizer.from_pretrained(source, revision=revision or "main"),
            revision=revision,
            request=replace(self._request(), calibration=self._calibration),
        )

    def _request(self) -> CorrectionRequest:
        """The request in the config. It is None only for a stored correction, for which this is not called."""
        assert self.glowq_config.request is not None
        return self.glowq_config.request

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
        """The base's tensors under the base's names, and the factors under the names that correction files use."""
        refuse_rewritten(model)
        factors = factor_tensors(attached_factors(model))
        # Saving calls this method before it writes config.json. If the correction was detached, the model is saved as
        # its plain base.
        config: Any = model.config
        config.quantization_config = self.glowq_config if factors else self.quantization_config
        if factors:
            self.glowq_config.groups = with_checksums(self.glowq_config.groups or {}, factors)
        with set_aside(model):
            state, metadata = self.base.get_state_dict_and_metadata(model)
            state = model.state_dict() if state is None else state
        return {**self._with_original(model, state), **factors}, metadata

    def _with_original(self, model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
        """The state, with the loaded checkpoint's tensors for modules that a library rewrites in memory."""
        backends = quantized_modules(model) if self.pre_quantized else {}
        rewritten = [name for name, backend in backends.items() if backend.saves == "files"]
        if not rewritten:
            return state
        originals = original_tensors(
            self._shards or model_shards(model, (self.glowq_config.base_model or {}).get("revision")), rewritten
        )
        names = set(rewritten)
        kept = {key: value for key, value in state.items() if key.rpartition(".")[0] not in names}
        return {**kept, **originals}

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Replace the quantized modules by dense ones with the correction merged, W' = Q + A B, for any base."""
        merge_into_dense(model, dtype)
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> Any:
        """Whether the model can be saved in one piece: the base's result, or a `Refusal` that says what to do."""
        found = self.base.is_serializable(*args, **kwargs)
        return found if isinstance(found, Refusal) or found else self._refusal()

    def _refusal(self) -> Refusal:
        return Refusal(
            f"a {method_of(self.quantization_config)} model cannot be saved in one piece: transformers could not load "
            "it again. Save its correction, which names its base: Correction.save_pretrained, or `glowq correct "
            "--format correction`."
        )


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
    _attach_all(model, correction.config, correction.factors)
    return correction


def adopt(model: nn.Module, config: GlowQConfig) -> None:
    """Make `save_pretrained` of a model with an attached correction write both the base and the correction."""
    base = getattr(model, "hf_quantizer", None) or LibraryHfQuantizer()
    model_config: Any = model.config
    stored = config.with_format("full")
    stored.base = _base_of(model, getattr(base, "quantization_config", stored.base))
    if isinstance(base, GlowQHfQuantizer):
        base.glowq_config = stored
    elif isinstance(base, HfQuantizer):
        kind: Any = GlowQHfQuantizer  # Any, because mypy sees abstract methods, which are delegated to the base
        quantizer = kind.__new__(kind)
        quantizer.base = base
        quantizer.glowq_config = stored
        quantizer.quantization_config = stored.base
        quantizer.pre_quantized = base.pre_quantized
        model.hf_quantizer = quantizer
    # Without a config of the base, the base's library saves the model, and config.json must not name glowq.
    if stored.base is not None:
        model_config.quantization_config = stored
    _drop_irreversible_conversions(model)


def _base_of(model: nn.Module, fallback: Any) -> Any:
    """The base's quantization config, as its library left it in the model's config, without its calibration text."""
    found = getattr(model.config, "quantization_config", None)
    base = fallback if found is None or isinstance(found, (GlowQConfig, dict)) else found
    return stored_base(base)


def _attach_all(model: nn.Module, config: GlowQConfig, factors: Sequence[GroupFactors]) -> None:
    check_scales(model)
    verify_fingerprint(model, config)
    for entry in factors:
        attach(model, entry, dtype=factor_dtype(model))
    adopt(model, config)


def _drop_irreversible_conversions(model: nn.Module) -> None:
    """Remove the base's load conversions: transformers cannot reverse them, so saving the model would raise."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [  # type: ignore[assignment]
            conversion
            for conversion in conversions
            if not any(getattr(op, "hf_quantizer", None) is not None for op in getattr(conversion, "operations", ()))
        ]
