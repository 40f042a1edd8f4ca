"""The transformers quantizer of a model with an attached correction: it saves and dequantizes the two together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...artifact.base_files import model_shards, original_tensors
from ...artifact.config import GlowQConfig
from ...artifact.factor_tensors import factor_tensors, with_checksums
from ...quantizers.model import quantized_modules
from ...quantizers.registry import method_of
from ...runtime.attach import attached_factors, set_aside
from ...runtime.fast_kernels import refuse_rewritten
from .delegation import DelegatingHfQuantizer, Refusal
from .factor_names import keep_factor_names
from .merge import merge_into_dense

__all__ = ["CorrectedHfQuantizer"]


class CorrectedHfQuantizer(DelegatingHfQuantizer):
    """Delegates to the base's quantizer, and saves the factors with the model.

    `quantization_config` is the base's config, because transformers, PEFT and accelerate read its `quant_method`.

    Attributes:
        glowq_config: describes the correction; saved in config.json as long as the correction is attached.
    """

    glowq_config: GlowQConfig
    _shards: Sequence[str] = ()  # the files that the model was loaded from

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
        """The base's tensors under the base's names, and the factors under the names that correction files use."""
        refuse_rewritten(model)
        factors = factor_tensors(attached_factors(model))
        # Saving calls this method before it writes config.json. If the correction was detached, the model is saved as
        # its plain base.
        config: Any = model.config
        config.quantization_config = self.glowq_config if factors else self.quantization_config
        if factors:
            keep_factor_names(model, factors)
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
        originals = original_tensors(self._shards or model_shards(model, self.glowq_config.base_model or {}), rewritten)
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
