"""vLLM's default loader, extended for corrected models: it also finds the base's folder and reads the factors."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import is_pp_missing_parameter

from ...artifact.base_files import base_folder, refuse_unsafe
from ...artifact.factor_files import StoredFactors, open_factors
from ...artifact.factor_layout import FACTOR_KEYS
from ...artifact.saved import FACTORS_FILE
from ...errors import UnsupportedModuleError
from ...utils.files import checkpoint_files
from ...utils.snapshots import local_snapshot
from .config import GlowQQuantizationConfig
from .linear import GlowQLinearMethod

__all__ = ["GlowQModelLoader"]


class GlowQModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads a corrected model's base as vLLM loads any model, then its factors; loads any other model as vLLM does.

    The fingerprint of the base is not checked, because it is computed from transformers' modules. A base on the Hub is
    loaded at the commit that was corrected; a local folder is loaded without a check.
    """

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The base's tensors, from the folder that a correction names, or from the model's own folder without factors.

        Raises:
            ModelNotFoundError: a folder or one of its shards is missing.
            PickleRefusedError: the weights are stored only as pickles.
            UnsafePathError: a weight file is outside of its folder.
        """
        config = _config(model)
        if config is None:
            yield from super().get_all_weights(model_config, model)
            return
        base = copy.copy(model_config)
        base.model, base.revision = str(self._base(model_config, config)), None
        for name, tensor in super().get_all_weights(base, model):
            if not re.search(FACTOR_KEYS, name):
                yield name, tensor

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Load the base, then the factors of the layers in this process.

        Raises:
            CorrectionError: the files are corrupt, or a factor is missing, extra or misshaped.
            NonFiniteError: a factor holds NaN or Inf.
            UnsupportedModuleError: vLLM's model has no linear layer for a member of a group.
        """
        config = _config(model)
        if config is None and model_config.quantization == "glowq":
            raise UnsupportedModuleError(
                f"vLLM's {type(model).__name__} has no quantized linear layer, and so no place for a correction. Serve "
                "the model with transformers."
            )
        if config is not None:
            if getattr(config.base, "is_checkpoint_torchao_serialized", False):
                self.load_config.safetensors_load_strategy = "torchao"  # vLLM sets this only for "torchao" itself
            with open_factors(self._factor_files(model_config, config), config.stored.groups or {}) as factors:
                super().load_weights(model, model_config)
                _load_factors(model, config, factors)
        else:
            super().load_weights(model, model_config)

    def _folder(self, model_config: Any) -> Path:
        wanted = {"revision": model_config.revision, "cache_dir": self.load_config.download_dir}
        return local_snapshot(model_config.model, **{key: value for key, value in wanted.items() if value})

    def _base(self, model_config: Any, config: GlowQQuantizationConfig) -> Path:
        return self._folder(model_config) if config.stored.format == "full" else base_folder(config.stored)

    def _factor_files(self, model_config: Any, config: GlowQQuantizationConfig) -> list[Path]:
        folder = self._folder(model_config)
        files = checkpoint_files(folder) if config.stored.format == "full" else [str(folder / FACTORS_FILE)]
        refuse_unsafe(files, model_config.model, config.stored)
        return [Path(file) for file in files]


def _config(model: nn.Module) -> GlowQQuantizationConfig | None:
    found = (getattr(module, "quant_config", None) for module in model.modules())
    return next((config for config in found if isinstance(config, GlowQQuantizationConfig)), None)


def _load_factors(model: nn.Module, config: GlowQQuantizationConfig, factors: StoredFactors) -> None:
    loaded: set[str] = set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, GlowQLinearMethod):
            method.load(module, factors)
            loaded.update(method.members)
    names = {member: name for name, member in config.names.items()}
    for member in (member for group in (config.stored.groups or {}).values() for member in group["members"]):
        name = names.get(member, member)
        if member not in loaded and not is_pp_missing_parameter(f"{name}.", model):
            raise UnsupportedModuleError(
                f"vLLM's {type(model).__name__} has no linear layer {name!r}, so that {member} would go uncorrected: "
                "vLLM computes it otherwise (experts, an output head, a layer of another name). Leave its group out, "
                "or serve the model with transformers."
            )
