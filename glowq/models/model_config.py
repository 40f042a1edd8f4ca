"""Read the config.json of a model, and refuse what would harm the libraries that read it next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..quantizers.settings import check_dtype, check_values
from ..utils.checks import shown
from ..utils.files import read_json

__all__ = ["read_model_config"]


def read_model_config(file: Path) -> dict[str, Any]:
    """Read a model's config.json, and check the fields that decide which code runs.

    Raises:
        ModelNotFoundError: the file does not exist.
        ReadError: it is no regular file, or cannot be read.
        CorrectionError: it holds no JSON object, or one that is too large or nested too deeply.
        ConfigError: architectures, model_type, auto_map or quantization_config hold a value that no model has there.
            The fields of a correction are checked by `GlowQConfig`.
    """
    config = read_json(file)
    architectures, stored = config.get("architectures"), config.get("quantization_config")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(entry, str) for entry in architectures)
    ):
        raise ConfigError(f"architectures in {file} must be a list of names, found {shown(architectures)}.")
    for name in ("model_type", "dtype", "torch_dtype"):
        if not isinstance(config.get(name, ""), str | None):
            raise ConfigError(f"{name} in {file} must be a text, found {shown(config[name])}.")
        if name != "model_type" and config.get(name) is not None:
            check_dtype(f"{name} in {file}", config[name])
    auto_map = config.get("auto_map", {})
    if not isinstance(auto_map, dict) or not all(isinstance(entry, str | list | None) for entry in auto_map.values()):
        raise ConfigError(f"auto_map in {file} must be a JSON object of names, found {shown(auto_map)}.")
    if stored is None:
        return config
    legacy = isinstance(stored, dict) and ("load_in_4bit" in stored or "load_in_8bit" in stored)  # of bitsandbytes
    if not isinstance(stored, dict) or not isinstance(stored.get("quant_method", "" if legacy else None), str):
        raise ConfigError(
            f"quantization_config in {file} must be a JSON object with a quant_method, found {shown(stored)}."
        )
    if stored.get("quant_method") != "glowq":
        check_values(f"quantization_config in {file}", stored)
    return config
