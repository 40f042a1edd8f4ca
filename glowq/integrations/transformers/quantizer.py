"""glowq as a transformers quantizer: it holds the base's quantizer, lets it work, and adds the correction.

`hf_quantizer.quantization_config` stays the base's (transformers, peft and accelerate read its quant_method);
GlowQConfig lives in `model.config.quantization_config`. Factors are read by glowq itself, never by the weight
loader: a missing factor there is only a warning and uninitialized memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

from ...artifact.base_files import base_folder, base_shards, model_shards, original_tensors, refuse_unsafe
from ...artifact.config import GlowQConfig, base_settings
from ...artifact.correction import Correction
from ...artifact.factor_files import FACTOR_KEYS, factor_tensors, read_factors
from ...artifact.fingerprint import verify_fingerprint
from ...artifact.request import CorrectionRequest
from ...errors import ConfigError
from ...factors.factors import GroupFactors
from ...pipeline import correct as pipeline
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
from ...runtime.attach import attach, attached, attached_factors, factor_dtype, set_aside
from ...runtime.fast_kernels import refuse_rewritten
from ...utils.files import read_json
from .delegation import DelegatingHfQuantizer, LibraryHfQuantizer, Refusal
from .merge import merge_into_dense

__all__ = ["GlowQHfQuantizer", "adopt", "correct", "load_correction"]

_P = ParamSpec("_P")


class GlowQHfQuantizer(DelegatingHfQuantizer):
    """Delegates to the base quantizer; see the module's text."""

    requires_calibration = False
    _base_folder: Path | None = None  # where the base's files are, if the correction's folder holds only the correction
    _shards: Sequence[str] = ()  # what the loader read
    _factors: Sequence[GroupFactors] = ()  # read from files, to be attached when the base is loaded
    _calibration: Any = None  # text or token ids to correct with while loading

    def __init__(self, quantization_config: GlowQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        config = quantization_config
        if config.base is None and config.is_stored:
            raise ConfigError(
                "this correction's base says in no config.json how it is quantized; transformers cannot load it. Load "
                "the base as the library that quantized it does, then call glowq.load_correction(model, path)."
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
            self.pre_quantized = read_json(self._base_folder / "config.json").get("quantization_config") is not None
        self._calibration = calibration
        self._use(base_settings(config.base))
        if not self.pre_quantized and calibration is None and is_calibrated(self.quantization_config):
            raise ConfigError(
                f"{method_of(config.base)} needs text to quantize, which a correction does not hold: quantize the "
                "model, save it, and name the saved folder."
            )

    def _use(self, base: Any) -> None:
        """Delegate to the quantizer of `base` from now on."""
        backend = backend_of(base)
        if backend is not None:
            check_installed(backend, f"a {method_of(base)} model")
        self.base = AutoHfQuantizer.from_config(base, pre_quantized=self.pre_quantized)
        self.quantization_config = base

    def preprocess_model(
        self, model: PreTrainedModel, dtype: Any = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Let the loader read the base's shards where only the correction was named, then let the base do its work."""
        if checkpoint_files is None:
            raise ConfigError("glowq corrects checkpoints: load the model with from_pretrained(name_or_path).")
        refuse_unsafe(checkpoint_files, model.config.name_or_path, self.glowq_config)
        if self.glowq_config.is_stored:
            self._factors = read_factors([Path(file) for file in checkpoint_files], self.glowq_config.groups or {})
            ignored = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = {*ignored, FACTOR_KEYS}
        if self._base_folder is not None:
            # The loader reads this very list object.
            checkpoint_files[:] = base_shards(self._base_folder)
        self._shards = list(checkpoint_files)
        if not self.pre_quantized and is_calibrated(self.quantization_config):
            self._quantize_with_calibration(model)
        self.base.preprocess_model(model, dtype, checkpoint_files=checkpoint_files, **kwargs)

    def postprocess_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Let the base finish, close its traps, then attach the correction: stored, named, or made now."""
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
        """Let the base quantize with the very sequences that the correction is made of."""
        from transformers import AutoTokenizer

        name = model.config.name_or_path  # type: ignore[union-attr]
        with torch.device("cpu"):  # transformers builds the model on the meta device meanwhile
            tokenizer = AutoTokenizer.from_pretrained(name)
            self._calibration = pipeline.calibration_sequences(model, self._request(), tokenizer)
        self._use(with_calibration(self.quantization_config, self._calibration))

    def _correct_now(self, model: nn.Module) -> None:
        from transformers import AutoTokenizer

        source = str(model.config.name_or_path)  # type: ignore[union-attr]
        folder = Path(self._shards[0]).parent
        # In the Hub's cache a snapshot's folder has the name of its commit.
        revision = folder.name if folder.parent.name == "snapshots" and not os.path.isdir(source) else None
        correct(
            model,
            reference=folder if (folder / "config.json").is_file() else source,
            tokenizer=AutoTokenizer.from_pretrained(source, revision=revision or "main"),
            revision=revision,
            request=replace(self._request(), calibration=self._calibration),
        )

    def _request(self) -> CorrectionRequest:
        """What was asked for; only a configuration that stores a correction asks for nothing."""
        assert self.glowq_config.request is not None
        return self.glowq_config.request

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
        """The base's keys exactly as it writes them, the factors under the names that every correction file uses."""
        refuse_rewritten(model)
        factors = factor_tensors(attached_factors(model))
        # Saving asks for this first: a model that was detached since is stored as the plain base that it is again.
        config: Any = model.config
        config.quantization_config = self.glowq_config if factors else self.quantization_config
        with set_aside(model):
            state, metadata = self.base.get_state_dict_and_metadata(model)
            state = model.state_dict() if state is None else state
        return {**self._with_original(model, state), **factors}, metadata

    def _with_original(self, model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
        """The state, with what a library rewrites in memory taken from the checkpoint that was loaded."""
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
        """The dense model W' = Q + A B in place of the quantized one, for any base."""
        merge_into_dense(model, dtype)
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> Any:
        """Whether the model can be saved in one piece: the base's answer, a no with what can be done instead."""
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
        adopt(cast(nn.Module, args[0] if args else kwargs["model"]), correction.config)
        return correction

    return correct


correct = _adopting(pipeline.correct)  # what `glowq.correct` is: afterwards the model saves itself with its correction


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
        model: quantized, or dequantized while loading, as the correction's base was.
        path: a folder that `Correction.save_pretrained` wrote, or a Hub name.
        budget: cut the correction to a share of the quantized weights ("1%"), to a size ("200MB"), or to what recovers
            a share of the predicted loss ("recover 80%"); nothing else of it is read.
        rank_step, max_rank: of that cut, see `Correction.cut`.
        **hub_kwargs: e.g. `revision`, `token`.

    Returns:
        The correction as attached.

    Raises:
        CorrectionError: corrupt files, or a factor is missing, extra or misshaped.
        FingerprintError: the correction was made for other quantized weights.
        ConfigError: the model carries a correction already; or the budget is too small, larger than the correction, or
            out of reach, or the correction holds no measured gains.
    """
    correction = Correction.from_pretrained(path, budget=budget, rank_step=rank_step, max_rank=max_rank, **hub_kwargs)
    base_settings(correction.config.base)  # refuses a base whose library is not installed
    if attached(model):
        raise ConfigError("the model carries a correction already; call glowq.detach(model) first.")
    if method_of(correction.config.base) == "dense":
        adopt_dense(model)
    prepare_model(model)
    _attach_all(model, correction.config, correction.factors)
    return correction


def adopt(model: nn.Module, config: GlowQConfig) -> None:
    """Make an attached model save itself as a self-contained glowq model."""
    base = getattr(model, "hf_quantizer", None) or LibraryHfQuantizer()
    model_config: Any = model.config
    stored = config.with_format("full")
    stored.base = _base_of(model, getattr(base, "quantization_config", stored.base))
    if isinstance(base, GlowQHfQuantizer):
        base.glowq_config = stored
    elif isinstance(base, HfQuantizer):
        kind: Any = GlowQHfQuantizer  # whose abstract methods are the base's
        quantizer = kind.__new__(kind)
        quantizer.base = base
        quantizer.glowq_config = stored
        quantizer.quantization_config = stored.base
        quantizer.pre_quantized = base.pre_quantized
        model.hf_quantizer = quantizer
    if stored.base is not None:  # else the library saves the model, and its config.json must go on naming no other
        model_config.quantization_config = stored
    _drop_irreversible_conversions(model)


def _base_of(model: nn.Module, fallback: Any) -> Any:
    """The base's quantization config as its library left it in the model's, without the text that it quantized with."""
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
    """transformers cannot reverse a base's load conversions; left in place, saving the model again would raise."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [  # type: ignore[assignment]
            conversion
            for conversion in conversions
            if not any(getattr(op, "hf_quantizer", None) is not None for op in getattr(conversion, "operations", ()))
        ]
