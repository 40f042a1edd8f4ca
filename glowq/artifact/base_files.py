"""The files of a corrected model's base: its folder, its shards, and the tensors that only these files hold."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ConfigError, CorrectionError, FingerprintError, GlowQError, PickleRefusedError, UnsafePathError
from ..models.model_config import read_model_config
from ..quantizers.registry import method_of
from ..utils.files import check_regular, checkpoint_files, refuse_pickles
from ..utils.snapshots import local_snapshot
from .config import GlowQConfig
from .factor_layout import FACTOR_KEYS
from .saved import FACTORS_FILE

__all__ = ["base_folder", "base_shards", "check_same_model", "model_shards", "original_tensors", "refuse_unsafe"]

_SIZES = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def base_folder(config: GlowQConfig) -> Path:
    """The local folder of the model that a correction names as its base. The model is downloaded if necessary.

    Raises:
        ConfigError: the correction is for dense weights that transformers creates when it dequantizes the base. A
            correction that is loaded by its own name cannot request this.
    """
    base_model = config.base_model or {}
    kwargs = {"revision": base_model["revision"]} if base_model.get("revision") else {}
    folder = local_snapshot(base_model["name"], subfolder=base_model.get("subfolder"), **kwargs)
    if method_of(config.base) == "dense" and not _holds_dense_weights(folder):
        raise ConfigError(
            f"this correction is for the dense weights that transformers makes of {base_model['name']} on load. Load "
            "that model in the same way again (from_pretrained with its gguf_file or dequantize=True) and call "
            "glowq.load_correction(model, correction)."
        )
    return folder


def _holds_dense_weights(folder: Path) -> bool:
    config = folder / "config.json"
    if check_regular(config) is None or read_model_config(config).get("quantization_config"):
        return False
    return any(folder.glob("*.safetensors"))


def base_shards(folder: Path, variant: str | None = None) -> list[str]:
    """The shards of a base model.

    Args:
        folder: what `base_folder` returned.
        variant: see `checkpoint_files`.

    Raises:
        ConfigError: the folder holds a correction, not a base model.
        CorrectionError: a shard is corrupt or truncated.
    """
    if (folder / FACTORS_FILE).is_file():
        raise ConfigError(f"the base {folder} is itself a correction; name the quantized or full-precision model.")
    shards = checkpoint_files(folder, variant)
    for shard in shards:
        check_readable(shard)
    return shards


def check_readable(shard: str) -> None:
    """Refuse a safetensors file whose header does not fit the file. Its values are not read.

    Raises:
        CorrectionError: the file is corrupt or truncated.
    """
    try:
        with safe_open(shard, framework="pt"):
            pass
    except SafetensorError as error:
        raise CorrectionError(f"{shard} is corrupt or truncated ({error}); download or save it again.") from error


def check_same_model(folder: Path, config: Any) -> None:
    """Refuse a base folder that holds a model of other sizes than the one that the correction was made for.

    The fingerprint could not be compared: transformers cannot load such weights at all.

    Args:
        folder: the base's folder.
        config: the transformers config that the correction is stored with.

    Raises:
        FingerprintError: the message names the first size that differs.
    """
    stored = read_model_config(folder / "config.json")
    inner = stored.get("text_config")
    if stored.get("model_type") != config.model_type and isinstance(inner, dict):
        stored = inner  # a text model that was taken out of a larger one
    for name in _SIZES:
        expected, found = getattr(config, name, None), stored.get(name)
        if found is not None and expected is not None and found != expected:
            raise FingerprintError(
                f"the base {folder} is another model now: {name} is {found!r} in its config.json, and {expected!r} in "
                "that of the correction. Restore the base that it was made for, or correct the new one."
            )


def model_shards(model: Any, base_model: Mapping[str, Any]) -> list[str]:
    """The shards that transformers loaded `model` from.

    Args:
        model: a transformers model.
        base_model: revision, subfolder and variant that it was loaded from, as the correction names them.

    Raises:
        ConfigError: the shards cannot be found any more.
    """
    name = getattr(model.config, "_name_or_path", "")
    try:
        revision = {"revision": base_model["revision"]} if base_model.get("revision") else {}
        folder = local_snapshot(name, subfolder=base_model.get("subfolder"), **revision)
        return checkpoint_files(folder, base_model.get("variant"))
    except GlowQError as error:
        raise ConfigError(f"the model was loaded from {name!r}, whose files are needed to save it: {error}") from error


def original_tensors(shards: Sequence[str], modules: Sequence[str]) -> dict[str, Tensor]:
    """Read the tensors of quantized modules from their checkpoint, without any change.

    Args:
        shards: safetensors files.
        modules: module names; a tensor `<module>.<anything>` belongs to the module.

    Returns:
        Tensor name -> tensor on the CPU. The tensors are copies, so the files may be overwritten afterwards.

    Raises:
        CorrectionError: the files hold no tensor of a module, or do not exist any more.
    """
    wanted, tensors, found = set(modules), {}, set()
    for shard in shards:
        if not os.path.isfile(shard):
            raise CorrectionError(f"{shard} is gone: the model was loaded from it and cannot be saved without it.")
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                module = name.rpartition(".")[0]
                if module in wanted and not re.search(FACTOR_KEYS, name):
                    tensors[name] = file.get_tensor(name).clone()
                    found.add(module)
    missing = sorted(wanted - found)
    if missing:
        raise CorrectionError(
            f"the checkpoint in {os.path.dirname(shards[0])} holds no tensor of {missing[0]!r} under that name, so "
            "that the model cannot be saved in one piece; save its correction instead (Correction.save_pretrained)."
        )
    return tensors


def refuse_unsafe(files: Sequence[str], source: Any, config: GlowQConfig) -> None:
    """Refuse shards that are not safe to load.

    Args:
        files: the shards.
        source: folder or Hub name of the corrected model.
        config: config of the corrected model.

    Raises:
        PickleRefusedError: a shard is not a safetensors file, or its folder holds weights only as pickles.
        UnsafePathError: a shard lies outside the folder `source`; or a correction from the Hub or from its cache names
            a local folder as its base.
    """
    for file in files:
        refuse_pickles(Path(file).parent)
        if not file.endswith(".safetensors"):
            raise PickleRefusedError(f"{file} is not a safetensors file; glowq reads no other weights.")
    if os.path.isdir(source):
        root = os.path.abspath(source)
        outside = [file for file in files if os.path.commonpath([root, os.path.abspath(file)]) != root]
        if outside:
            raise UnsafePathError(f"{source} names {outside[0]!r}, which lies outside its folder; refused.")
    if config.format == "correction" and _is_of_hub(source):
        _refuse_local(source, str((config.base_model or {})["name"]))


def _is_of_hub(source: Any) -> bool:
    """Whether files come from the Hub: by a repository's name, or from its folder in the cache."""
    path = Path(source).resolve()
    in_cache = path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
    return in_cache or not os.path.isdir(source)


def _refuse_local(source: Any, name: str) -> None:
    """Refuse a base that is a local folder, because a stranger must not choose what is read from this machine."""
    try:
        validate_repo_id(name)
        advice = "If it means the Hub's repository of that name, load it from another working directory."
        refused = os.path.lexists(name)
    except HFValidationError:
        advice, refused = "Its author should push the base first.", True
    if refused:
        raise UnsafePathError(f"{source} names the local folder {name!r} as its base; refused. {advice}")
