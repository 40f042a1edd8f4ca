"""Read and check a folder that glowq saved, before anything is uploaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ...errors import ModelNotFoundError, PickleRefusedError
from ...models.model_config import read_model_config
from ...selection.allocation import GroupGains
from ...utils.files import PICKLES, checkpoint_files, read_json, safe_join
from ...utils.manifest import MANIFEST
from ...utils.output import EXPORT_MANIFEST
from ..correction_config import CorrectionConfig
from ..custom_code import code_in
from ..factor_headers import read_factor_headers
from ..saved import FACTORS_FILE

__all__ = ["SavedResult", "read_result", "stored_gains"]

_TERMS = ("LICENSE*", "NOTICE*")  # glowq does not write these, but the base's license may require them
_ADAPTER = "adapter_config.json"  # written by an export to PEFT
_RESULT_FILES = (
    "config.json",
    "generation_config.json",
    FACTORS_FILE,
    "model*.safetensors",
    "model.safetensors.index.json",
    "README.md",
    "budgets.png",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
)


@dataclass(frozen=True)
class SavedResult:
    """A folder to push.

    Attributes:
        folder: path of the folder.
        kind: "correction", "full" or "export".
        files: path in the repository -> file on this machine, or the content to upload instead.
        left_out: files in the folder that are not uploaded.
        config: config of a correction or a full model; None for an export.
        base: Hub name or local folder of the base, and its revision; None if no base is named.
    """

    folder: Path
    kind: str
    files: Mapping[str, Path | bytes]
    left_out: list[str]
    config: CorrectionConfig | None
    base: tuple[str, str | None] | None

    @property
    def needs_base(self) -> bool:
        """Whether users must be able to load the base, too. A full model is complete without it."""
        return self.base is not None and self.kind != "full"


def read_result(folder: Path) -> SavedResult:
    """Read and check a folder to push.

    Raises:
        ModelNotFoundError: there is no such folder, it holds nothing that glowq saved, or files are missing, also of
            custom code that config.json names.
        PickleRefusedError: the folder holds a pickle.
        CorrectionError: a file is corrupt, or a factor is missing.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is no folder; give one that `glowq correct`, select or export wrote.")
    is_export = (folder / EXPORT_MANIFEST).is_file()
    config_file = folder / "config.json"
    stored = read_json(config_file).get("quantization_config") if config_file.is_file() else None
    if not is_export and (not isinstance(stored, dict) or stored.get("quant_method") != "glowq"):
        raise ModelNotFoundError(
            f"{folder} holds nothing that glowq saved; give a folder that `glowq correct`, select or export wrote."
        )
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    pickles = [name for name in found if name.endswith(PICKLES)]
    if pickles:
        raise PickleRefusedError(f"{folder / pickles[0]} is a pickle, which glowq does not upload; remove it.")
    if is_export:
        return _read_export(folder, set(found))
    config = CorrectionConfig.from_dict(stored or {})
    code = code_in(folder, read_model_config(config_file))
    stored_gains(folder, config)  # raises an error if a factor file is damaged
    files = {name: path for name, path in found.items() if name in code or _is_named(name, _RESULT_FILES + _TERMS)}
    base = config.base_model or {}
    left_out = sorted(set(found) - {*files, MANIFEST})  # config.json and the card can change
    return SavedResult(folder, config.format, files, left_out, config, (str(base["name"]), base["revision"]))


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)  # a * of fnmatch also matches a /


def _read_export(folder: Path, found: set[str]) -> SavedResult:
    """Read an export: the files that its manifest names, and the base if it is an adapter."""
    named = [EXPORT_MANIFEST, *read_json(folder / EXPORT_MANIFEST).get("files", {})]
    files = {name: safe_join(folder, name) for name in named}
    missing = sorted(set(files) - found)
    if missing:
        raise ModelNotFoundError(f"{files[missing[0]]} is missing: the export is incomplete; export again.")
    adapter = read_json(folder / _ADAPTER) if _ADAPTER in files else {}
    name = adapter.get("base_model_name_or_path")
    return SavedResult(
        folder,
        "export",
        files,
        sorted(found - {*files, MANIFEST}),
        None,
        (str(name), adapter.get("revision")) if name else None,
    )


def stored_gains(folder: Path, config: CorrectionConfig) -> list[GroupGains]:
    """The gains and bytes of the groups in a saved correction or a full model.

    Raises:
        CorrectionError: a file is corrupt, or a factor is missing, extra or misshaped.
    """
    names = [folder / FACTORS_FILE] if config.format == "correction" else map(Path, checkpoint_files(folder))
    return read_factor_headers(list(names), config.groups or {}).group_gains
