"""The transformers quantizer that loads corrected models: the base's quantizer loads the base, glowq the factors.

glowq reads the factors itself, because the weight loader of transformers only warns about a missing tensor and leaves
its memory uninitialized.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from ...artifact.base_files import base_folder, base_shards, check_same_model, refuse_unsafe
from ...artifact.config import GlowQConfig
from ...artifact.factor_files import read_factors
from ...artifact.factor_layout import FACTOR_KEYS
from ...artifact.request import CorrectionRequest
from ...data.read_inputs import holds_inputs
from ...data.text import check_source
from ...errors import ConfigError, CorrectionError
from ...factors.factors import GroupFactors
from ...models.candidates import renaming
from ...models.fast_products import fast_products
from ...models.model_config import read_model_config
from ...pipeline.mixed import Mixture, check_mixable, plan_mixture
from ...pipeline.sequences import calibration_sequences, unmeasured
from ...quantizers.model import prepare_model
from ...quantizers.registry import backend_of, check_installed, is_calibrated, method_of, with_calibration
from ...quantizers.settings import base_settings
from .class_names import absent_linears, is_other_class
from .memory import attach_all, base_of, correct, drop_irreversible_conversions, load_correction
from .saving import CorrectedHfQuantizer

__all__ = ["GlowQHfQuantizer"]

_SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")  # modules that a quantizer leaves alone


class GlowQHfQuantizer(CorrectedHfQuantizer):
    """Loads a model with the base's quantizer, and attaches the correction that `GlowQConfig` describes or asks for."""

    requires_calibration = False
    _base_folder: Path | None = None  # folder of the base, if the correction is stored without its base
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
        if calibration is not None:
            check_source(calibration)
        if config.request is not None and config.request.mixed:
            check_mixable(config.base)
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
            variant = (self.glowq_config.base_model or {}).get("variant")
            checkpoint_files[:] = base_shards(self._base_folder, variant)
        self._shards = list(checkpoint_files)
        if not self.pre_quantized and is_calibrated(self.quantization_config):
            self._quantize_with_calibration(model)
        backend, rename = backend_of(self.quantization_config), None
        if is_other_class(model):
            self._leave_alone(model, absent_linears(model, checkpoint_files))
            rename = renaming(model)
        self.base.preprocess_model(model, dtype, checkpoint_files=checkpoint_files, **kwargs)
        if backend is not None and rename is not None:
            backend.rename_stored(self.base, rename)

    def _leave_alone(self, model: PreTrainedModel, modules: Sequence[str]) -> None:
        """Let the base's quantizer skip these modules, now and when the model is saved and loaded again."""
        base = self.base.quantization_config
        field = next((name for name in _SKIPPED if hasattr(base, name)), None)
        if modules and field is not None:
            skipped = self.base.get_modules_to_not_convert(model, getattr(base, field))
            setattr(base, field, [*skipped, *modules])

    def postprocess_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Run the base's own postprocessing, make its modules safe to read and run, and attach the correction.

        The correction comes from the loaded files, from the folder or Hub name in `GlowQConfig`, or is computed now.
        """
        with fast_products(model):  # a base that is calibrated runs the model
            self.base.postprocess_model(model, **kwargs)
        self.quantization_config = base_of(model, self.quantization_config)
        prepare_model(model)
        drop_irreversible_conversions(model)
        config = self.glowq_config
        if config.is_stored:
            factors, self._factors = self._factors, ()
            attach_all(model, config, factors, is_other_class(model))
        elif config.correction is not None:
            cut = self._request().ranks
            load_correction(model, config.correction, budget=cut.budget, rank_step=cut.rank_step, max_rank=cut.max_rank)
        else:
            self._correct_now(model)
        return model

    def _quantize_with_calibration(self, model: nn.Module) -> None:
        """Let the base calibrate its quantization on the same sequences as the factors."""
        source = str(model.config.name_or_path)  # type: ignore[union-attr]
        with torch.device("cpu"):  # transformers creates tensors on the meta device at this point
            tokenizer = _tokenizer(source, _place_of(source, Path(self._shards[0])), self._calibration)
            self._calibration = calibration_sequences(model, self._request(), tokenizer)
            sequences = unmeasured(self._calibration, self._request().seed)
        self._use(with_calibration(self.quantization_config, sequences))

    def _correct_now(self, model: nn.Module) -> None:
        source, folder = str(model.config.name_or_path), Path(self._shards[0]).parent  # type: ignore[union-attr]
        place = _place_of(source, Path(self._shards[0]))
        reference = folder if (folder / "config.json").is_file() else source
        request = replace(self._request(), calibration=self._calibration)
        common = {"reference": reference, "tokenizer": _tokenizer(source, place, self._calibration), **place}
        mixture = self._mix(model, source, request, common) if request.mixed else None
        budget = request.budget if mixture is None else mixture.budget
        correct(model, **common, request=replace(request, mixed=False, budget=budget))
        if mixture is not None:
            self.glowq_config.record(mixed=mixture.record)

    def _mix(
        self, model: nn.Module, source: str, request: CorrectionRequest, common: Mapping[str, Any]
    ) -> Mixture | None:
        """Give more bits to the groups that gain more by them than by ranks; None if there are none."""
        place = {name: common[name] for name in ("revision", "subfolder", "variant") if common[name] is not None}
        options = {**place, "dtype": model.dtype, "device_map": {"": model.device}}

        kind: Any = type(model)

        def load(config: Any) -> nn.Module:
            other: nn.Module = kind.from_pretrained(source, quantization_config=config, **options)
            prepare_model(other)
            return other.eval()

        mixture = plan_mixture(model, self.quantization_config, load, request=request, **common)
        if mixture is not None:
            other = load(mixture.config)
            for name in (member for group in mixture.groups for member in group.members):
                model.set_submodule(name, other.get_submodule(name))
            self.quantization_config = self.base.quantization_config = mixture.config
            self.glowq_config.base = mixture.config
            model_config: Any = model.config
            model_config.quantization_config = mixture.config  # `correct` makes it that of a corrected model
        return mixture

    def _request(self) -> CorrectionRequest:
        """The request in the config. It is None only for a stored correction, for which this is not called."""
        assert self.glowq_config.request is not None
        return self.glowq_config.request


def _place_of(source: str, shard: Path) -> dict[str, Any]:
    """The revision, subfolder and variant of a model, by a file that it is loaded from."""
    folder, revision = shard.parent, None
    if os.path.isdir(source):
        root = Path(source)
    else:  # in the Hub's cache, the folder of a snapshot is named after its commit
        root = next((parent for parent in shard.parents if parent.parent.name == "snapshots"), folder)
        revision = root.name if root.parent.name == "snapshots" else None
    subfolder = os.path.relpath(folder, root).replace(os.sep, "/")
    marks = shard.name.removesuffix(".safetensors").split(".")[1:]  # model.fp16-00001-of-00002.safetensors
    return {
        "revision": revision,
        "subfolder": None if subfolder == "." else subfolder,
        "variant": re.sub(r"-\d+-of-\d+$", "", marks[0]) if marks else None,
    }


def _tokenizer(source: str, place: Mapping[str, Any], calibration: Any) -> Any:
    """The tokenizer of a model: from its subfolder, or else from the folder or repository itself.

    None if it has none, as a model of images, and the calibration is no text.
    """
    from transformers import AutoTokenizer

    revision = place["revision"] or "main"
    if place["subfolder"] is not None:
        try:
            return AutoTokenizer.from_pretrained(source, revision=revision, subfolder=place["subfolder"])
        except OSError:
            pass
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError):
        if holds_inputs(calibration):
            return None
        raise
