"""Code of models that transformers does not have: it is copied beside a correction, and never run.

transformers runs such code only for a user who passes `trust_remote_code=True`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelNotFoundError
from ..utils.files import check_regular
from ..utils.scratch import temporary_folder

if TYPE_CHECKING:
    from torch import nn

__all__ = ["code_in", "code_of", "of_repository"]


def code_of(model: nn.Module) -> dict[str, bytes]:
    """The files that define a model's class and its config's class: name -> content; empty if a library has them.

    Code that was loaded from the Hub stays there: config.json then names its repository.
    """
    parts = [part for part in (model, getattr(model, "config", None)) if getattr(part, "_auto_class", None)]
    if not parts:
        return {}
    from transformers.dynamic_module_utils import custom_object_save

    with temporary_folder("code") as folder:
        for part in parts:
            custom_object_save(part, folder)
        return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def code_in(folder: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of custom code in a folder that its config.json names, with what they import from the same folder.

    Args:
        folder: the folder of a corrected model.
        config: its config.json, see `read_model_config`.

    Raises:
        ModelNotFoundError: a file is missing.
        ReadError: a file is no regular file.
    """
    wanted = _modules(config.get("auto_map"))
    if not wanted:
        return {}
    from transformers.dynamic_module_utils import get_relative_imports

    found: dict[str, bytes] = {}
    while wanted:
        module = wanted.pop()
        file = folder / f"{module}.py"
        # What the files name is not trusted: only a file that lies in the folder itself is read.
        if file.name in found or not module.isidentifier():
            continue
        if check_regular(file) is None:
            raise ModelNotFoundError(f"{file} is missing: config.json or another file names its code.")
        found[file.name] = file.read_bytes()
        wanted += get_relative_imports(file)
    return dict(sorted(found.items()))


def of_repository(auto_map: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The `auto_map` of config.json, with the Hub repository `name` in every entry that names a file of its own."""

    def named(entry: Any) -> Any:
        if isinstance(entry, list | tuple):
            return [named(part) for part in entry]
        return f"{name}--{entry}" if isinstance(entry, str) and "--" not in entry else entry

    return {auto_class: named(entry) for auto_class, entry in auto_map.items()}


def _modules(auto_map: Any) -> list[str]:
    entries = [entry for entry in (auto_map or {}).values() if entry is not None]
    flat = [part for entry in entries for part in (entry if isinstance(entry, list | tuple) else [entry])]
    return sorted({part.rpartition(".")[0] for part in flat if isinstance(part, str) and "--" not in part})
