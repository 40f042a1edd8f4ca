"""The ways out: `export` writes a corrected model in another project's format, checked against the model itself.

An exporter is a file of this folder with one function:

    write(source: str, folder: Path, *, <its options>) -> dict[str, Any]

It reads the corrected model `source` (folder or Hub name, either saved form), writes into `folder` (empty), and checks
what it wrote against the corrected model in memory: it raises `ExportError` if they differ, and returns what a user
wants to know as JSON, "check" with the measured differences among it. The same source gives the same files. An
exporter that writes no README.md of its own says in two texts what its files are and how they are run, `WHAT` and
`USE`, and gets one.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from ..._version import __version__
from ...artifact.card import CARD, export_card
from ...errors import ConfigError
from ...utils.output import EXPORT_MANIFEST, Kind, check_output, write_directory
from .common import stored_correction

__all__ = ["TARGETS", "check_options", "export"]

TARGETS: Mapping[str, str] = {  # what --to takes -> the module that writes it
    "merged": ".merged",
    "onnx": "..onnx.exporter",
    "peft": "..peft.exporter",
}


def export(source: str, to: str, output: str | Path, **options: Any) -> dict[str, Any]:
    """Write a corrected model in another project's format; all of it, or nothing.

    Args:
        source: folder or Hub name of a saved correction or of a self-contained corrected model.
        to: one of `TARGETS`.
        output: folder to write; must be new, empty, or an earlier export.
        **options: those of the exporter, see its `write`.

    Returns:
        "to", "output", "bytes" (of all files), "files" (name -> bytes), and what the exporter says: "check" among it.

    Raises:
        ConfigError: no such target, or an option that it does not take.
        ExportError: the model has no form in that format, or what was written differs from the model.
        OutputError: the folder holds other files, cannot be written, or the disk is full.
    """
    write = check_options(to, options)
    target = Path(output)
    check_output(target, kind=Kind.EXPORT)  # before hours of work
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

    write_directory(target, fill, kind=Kind.EXPORT)
    return {"to": to, "output": str(output), "bytes": sum(facts["files"].values()), **facts}


def check_options(to: str, options: Mapping[str, Any]) -> Callable[..., dict[str, Any]]:
    """The `write` function of target `to`, once it is known to take `options`.

    Raises:
        ConfigError: no such target, or an option that it does not take.
    """
    if to not in TARGETS:
        near = get_close_matches(to, TARGETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(TARGETS)}."
        raise ConfigError(f"no export format {to!r}; {hint}")
    write: Callable[..., dict[str, Any]] = import_module(TARGETS[to], __package__).write
    taken = [name for name, kind in inspect.signature(write).parameters.items() if kind.kind is kind.KEYWORD_ONLY]
    odd = sorted(set(options) - set(taken))
    if odd:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in taken) or "no option"
        raise ConfigError(f"--{odd[0].replace('_', '-')} is no option of --to {to}, which takes {shown}.")
    return write
