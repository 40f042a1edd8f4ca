"""`export` writes a corrected model in another project's format, and checks the result against the corrected model.

An exporter is a module that `TARGETS` names, with one function:

    write(source: str, folder: Path, *, <its options>) -> dict[str, Any]

The function reads the corrected model `source` (folder or Hub name, in either saved form), writes into the empty folder
`folder`, and compares the written files with the corrected model in memory. It raises `ExportError` if they differ. It
returns facts for the user that can be stored as JSON, with the measured differences under "check". The same source
always gives the same files. If an exporter writes no README.md, its module has two texts from which `export` writes
one: `WHAT` (what the files are) and `USE` (how to run them).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..._version import __version__
from ...artifact.card import CARD, export_card
from ...errors import ConfigError
from ...utils.names import unknown_export
from ...utils.output import EXPORT_MANIFEST, Kind, check_output, write_directory
from .common import stored_correction

__all__ = ["TARGETS", "check_options", "export"]

TARGETS: Mapping[str, str] = {  # value of --to -> module of the exporter
    "merged": ".merged",
    "onnx": "..onnx.exporter",
    "peft": "..peft.exporter",
}


def export(source: str, to: str, output: str | Path, **options: Any) -> dict[str, Any]:
    """Write a corrected model in another project's format. The output folder is written completely or not at all.

    Args:
        source: folder or Hub name of a saved correction or of a self-contained corrected model.
        to: one of `TARGETS`.
        output: folder to write; must be new, empty, or an earlier export.
        **options: options of the exporter, see its `write`.

    Returns:
        "to", "output", "bytes" (of all files), "files" (name -> bytes), and what the exporter returns, such as "check".

    Raises:
        ConfigError: unknown target, or an option that the target does not take.
        ExportError: the format cannot hold this model, or the written files differ from the corrected model.
        OutputError: the folder holds other files, cannot be written, or the disk is full.
    """
    write = check_options(to, options)
    target = Path(output)
    check_output(target, kind=Kind.EXPORT)  # refuse an unsuitable folder now, not after hours of work
    facts: dict[str, Any] = {}

    def fill(folder: Path) -> None:
        facts.update(write(source, folder, **options))
        if not (folder / CARD).exists():
            exporter = import_module(TARGETS[to], __package__)
            stored = stored_correction(source)
            (folder / CARD).write_bytes(export_card(stored.base_model or {}, exporter.WHAT, exporter.USE))
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*")}
        facts["files"] = {name: files[name] for name in sorted(files) if (folder / name).is_file()}
        manifest = {"glowq": __version__, "to": to, "options": options, **facts}
        (folder / EXPORT_MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")

    write_directory(target, fill, kind=Kind.EXPORT, checked=True)
    return {"to": to, "output": str(output), "bytes": sum(facts["files"].values()), **facts}


def check_options(to: str, options: Mapping[str, Any]) -> Callable[..., dict[str, Any]]:
    """Check that target `to` takes `options`, and return its `write` function.

    Raises:
        ConfigError: unknown target, or an option that the target does not take.
    """
    if to not in TARGETS:
        raise ConfigError(unknown_export(to, TARGETS))
    write: Callable[..., dict[str, Any]] = import_module(TARGETS[to], __package__).write
    taken = [name for name, kind in inspect.signature(write).parameters.items() if kind.kind is kind.KEYWORD_ONLY]
    odd = sorted(set(options) - set(taken))
    if odd:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in taken) or "no option"
        raise ConfigError(f"--{odd[0].replace('_', '-')} is no option of --to {to}, which takes {shown}.")
    return write
