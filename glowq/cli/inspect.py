"""`glowq inspect`: what a model folder or correction is, from config.json and safetensors headers alone."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from ..errors import CorrectionError, ModelNotFoundError
from ..files import local_snapshot, read_json, refuse_pickles
from .common import JsonOption, ModelArgument, grid, session

__all__ = ["inspect"]

_Headers = dict[str, tuple[tuple[int, ...], int]]  # tensor name -> shape, bytes


def inspect(model: ModelArgument, json: JsonOption = False) -> None:
    """Show what a correction or model is, without loading it.

    \b
    Example:
      glowq inspect corrected
    """
    with session(json) as show:
        config, headers = _read(model)
        stored = config.get("quantization_config")
        result: dict[str, Any] = {
            "model": model,
            "kind": "plain" if stored is None else "quantized",
            "architecture": (config.get("architectures") or [None])[0],
            "dtype": config.get("dtype", config.get("torch_dtype")),
            "file_bytes": sum(size for _, size in headers.values()),
        }
        if stored is not None and stored.get("quant_method") != "glowq":
            result.update(quant_method=stored.get("quant_method"), settings=stored)
        elif stored is not None:
            result.update(_correction(model, stored, headers))
        show(result, lambda: _tables(result))


def _read(name: str) -> tuple[dict[str, Any], _Headers]:
    if not Path(name).is_dir():
        return _read_hub(name)
    config = read_json(Path(name) / "config.json")
    refuse_pickles(Path(name))
    headers = [_header(file) for file in sorted(Path(name).glob("*.safetensors"))]
    return config, {key: value for header in headers for key, value in header.items()}


def _read_hub(name: str) -> tuple[dict[str, Any], _Headers]:
    """Headers over the network where it is there, else from the cache."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi()
    try:
        files = [file for file in api.list_repo_files(name) if file.endswith(".safetensors")]
        metadata = [api.parse_safetensors_file_metadata(name, file).tensors for file in files]
        config = read_json(Path(hf_hub_download(name, "config.json")))
    except HFValidationError as error:
        raise ModelNotFoundError(f"{name!r} is neither a folder nor the name of a Hub repository.") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return _read(str(local_snapshot(name, local_files_only=True)))
    found = {key: info for tensors in metadata for key, info in tensors.items()}
    return config, {
        key: (tuple(info.shape), info.data_offsets[1] - info.data_offsets[0]) for key, info in found.items()
    }


def _header(file: Path) -> _Headers:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):  # checks the header against the file's size
            pass
    except SafetensorError as error:
        raise CorrectionError(f"{file} is corrupt or truncated ({error}); download it again.") from error
    with file.open("rb") as stream:
        header = jsonlib.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    header.pop("__metadata__", None)
    return {
        name: (tuple(info["shape"]), info["data_offsets"][1] - info["data_offsets"][0]) for name, info in header.items()
    }


def _correction(model: str, stored: dict[str, Any], headers: _Headers) -> dict[str, Any]:
    from ..config import GlowQConfig

    config = GlowQConfig.from_dict({**stored, "base": None})  # the base's library need not be installed
    groups = [_group(model, name, group, headers) for name, group in (config.groups or {}).items()]
    factor_bytes = sum(group["bytes"] for group in groups)
    return {
        "kind": config.format,
        "version": config.version,
        "base": stored.get("base"),
        "base_model": config.base_model,
        "base_bytes": config.base_bytes,
        "factor_bytes": factor_bytes,
        "overhead": factor_bytes / config.base_bytes if config.base_bytes else None,
        "method": config.method,
        "seed": config.seed,
        "provenance": config.provenance,
        "groups": groups,
    }


def _group(model: str, name: str, group: Mapping[str, Any], headers: _Headers) -> dict[str, Any]:
    rank, widths = group["rank"], dict(zip(group["members"], group["out_features"], strict=True))
    shapes = {f"{name}.right": (rank, group["in_features"])}
    shapes.update({f"{member}.left": (width, rank) for member, width in widths.items()})
    for tensor, shape in shapes.items():
        found = headers.get(tensor, (None, 0))[0]
        if found != shape:
            what = "missing" if found is None else f"of shape {found}"
            raise CorrectionError(f"factor {tensor!r} of {model} is {what}, expected shape {shape}; correct again.")
    sizes = sum(headers[tensor][1] for tensor in shapes)
    values = {"name": name, "bytes": sizes, "parameters": sum(map(prod, shapes.values()))}
    return {**values, **group, "energy_removed": sum(group["gains"])}


def _tables(result: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table

    shown = grid(_flat({key: value for key, value in result.items() if key != "groups"}))
    if not result.get("groups"):
        return shown
    table = Table("group", "rank", "in", "out", "bytes", "energy removed")
    for group in result["groups"]:
        out = " + ".join(map(str, group["out_features"]))
        numbers = (group["rank"], group["in_features"], out, f"{group['bytes']:,}", f"{group['energy_removed']:.4g}")
        table.add_row(group["name"], *map(str, numbers))
    return Group(shown, table)


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """For people: nested settings as "base.load_in_4bit", private and empty ones left out."""
    rows: dict[str, str] = {}
    for key, value in facts.items():
        if isinstance(value, dict):
            rows.update(_flat(value, f"{prefix}{key}."))
        elif value is not None and not key.startswith("_"):
            form = ".2%" if key == "overhead" else "," if key.endswith("_bytes") else ""
            rows[prefix + key] = format(value, form) if form else str(value)
    return rows
