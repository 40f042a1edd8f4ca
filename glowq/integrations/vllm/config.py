"""glowq's quantization config for vLLM: the base's own config, and the layers of the model that carry a correction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import vllm
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.transformers_utils.config import checkpoint_has_lm_head

from ...artifact.base_files import base_folder, base_shards, refuse_unsafe
from ...artifact.config import GlowQConfig
from ...artifact.factor_layout import stored_group
from ...errors import ConfigError, UnknownBaseError
from ...quantizers.loading.dense import DenseConfig
from ...quantizers.registry import method_of
from ...utils.files import read_json
from .linear import GlowQLinearMethod

__all__ = ["LOAD_FORMAT", "GlowQQuantizationConfig"]

LOAD_FORMAT = "auto"  # vLLM's default load format, whose loader glowq extends


class GlowQQuantizationConfig(QuantizationConfig):  # type: ignore[misc]
    """Delegates to the base's quantization config in vLLM, and adds the factors to every corrected layer.

    Attributes:
        stored: the glowq config in config.json, without its base, whose library vLLM does not need.
        base: the base's quantization config in vLLM; None if its weights are plain floats.
        names: vLLM's name of each member of a group -> its name in the checkpoint.
    """

    def __init__(self, stored: GlowQConfig, base: Any) -> None:
        super().__init__()
        self.stored = stored
        self.base = base
        self.names = {member: member for group in (stored.groups or {}).values() for member in group["members"]}
        if base is not None:
            self._ignore_unexpected_suffixes = base._ignore_unexpected_suffixes

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GlowQQuantizationConfig:
        """Read config.json's `quantization_config`.

        Raises:
            ConfigError: a field is unknown or damaged, or the config names no group or no base.
            VersionError: a newer version of the format wrote the config.
            UnknownBaseError: vLLM cannot run the base.
        """
        base = config.get("base")
        plain = method_of(base) == "dense"
        stored = GlowQConfig.from_dict({**config, "base": DenseConfig() if plain else None})
        if not stored.is_stored:
            raise ConfigError("config.json names no group of a glowq correction; serve what `glowq correct` wrote.")
        return cls(stored, None if plain else _base_config(base))

    def __getattr__(self, name: str) -> Any:
        # Some models read attributes that only the base's config has. While unpickling, `base` is not set yet.
        base = self.__dict__.get("base")
        if base is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(base, name)

    def get_name(self) -> str:
        """The quantization method in config.json."""
        return "glowq"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes that the base supports."""
        plain = [torch.bfloat16, torch.half, torch.float32]
        return plain if self.base is None else self.base.get_supported_act_dtypes()

    def get_min_capability(self) -> int:
        """The GPU capability that the base needs; -1 if its weights are plain floats."""
        return -1 if self.base is None else self.base.get_min_capability()

    def get_config_filenames(self) -> list[str]:
        """No files: config.json holds the whole config."""
        return []

    def get_cache_scale_mapper(self) -> Any:
        """The base's mapper of cache scales."""
        return (self.base or QuantizationConfig).get_cache_scale_mapper()

    def get_checkpoint_weight_mapper(self) -> Any:
        """The base's mapper of checkpoint weights."""
        return (self.base or QuantizationConfig).get_checkpoint_weight_mapper()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Let the base's config read the checkpoint that holds the base's tensors; it is downloaded if needed.

        Raises:
            ModelNotFoundError: a correction's base cannot be found, or a shard of it is missing.
            PickleRefusedError: the base has its weights only as pickles.
            UnsafePathError: a correction on the Hub names a local folder as its base.
            ConfigError: the base is a correction itself, or its files are not quantized (transformers quantizes them
                while loading, vLLM does not).
        """
        if self.stored.format == "correction":
            refuse_unsafe([], model_name, self.stored)
            folder = base_folder(self.stored)
            base_shards(folder)
            if self.base is not None and not read_json(folder / "config.json").get("quantization_config"):
                raise ConfigError(
                    f"the base {folder} is not quantized: transformers quantizes it while loading, vLLM does not. Save "
                    "the corrected model in one piece (`glowq correct --format full`, or from_pretrained of this "
                    "correction and save_pretrained), and serve that."
                )
            model_name, revision = str(folder), None
            if getattr(hf_config, "tie_word_embeddings", False) and checkpoint_has_lm_head(model_name):
                # vLLM does the same for a checkpoint with a head of its own, but it looks for the head in the
                # correction's files, not in the base's.
                hf_config.tie_word_embeddings = hf_config.get_text_config().tie_word_embeddings = False
        if self.base is not None:
            self.base.maybe_update_config(model_name, hf_config=hf_config, revision=revision)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the members to the names of vLLM's modules."""
        self.names = hf_to_vllm_mapper.apply_dict(self.names)
        if self.base is not None:
            self.base.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The base's method for a layer, wrapped in a `GlowQLinearMethod` if the layer computes a member of a group."""
        if self.base is not None:
            self.base.packed_modules_mapping = self.packed_modules_mapping
            method = self.base.get_quant_method(layer, prefix)
        else:
            method = UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if method is None or not isinstance(layer, LinearBase):
            return method
        parent, _, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name, [name])
        members = [self.names.get(f"{parent}.{part}" if parent else part, part) for part in parts]
        groups = [
            (stored_group(name, stored), int(stored["rank"]))
            for name, stored in (self.stored.groups or {}).items()
            if not set(stored["members"]).isdisjoint(members)
        ]
        if not groups:
            return method
        _check_load_format()
        return GlowQLinearMethod(method, members, groups)


def _check_load_format() -> None:
    load_format = get_current_vllm_config().load_config.load_format
    if load_format != LOAD_FORMAT:
        raise ConfigError(
            f"vLLM was started with --load-format {load_format}, which reads no factors; leave --load-format out."
        )


def _base_config(base: Any) -> Any:
    if base is None:
        raise ConfigError("no config.json says how this correction's base is quantized, so vLLM cannot load it.")
    method = method_of(base)
    try:
        return get_quantization_config(method).from_config(base)
    except (ValueError, ImportError) as error:
        raise UnknownBaseError(
            f"vLLM {vllm.__version__} cannot run this correction's base ({method}): {error}. Correct a base that it "
            "runs (GPTQ, AWQ, compressed-tensors, torchao, or plain weights), or serve the model with transformers."
        ) from error
