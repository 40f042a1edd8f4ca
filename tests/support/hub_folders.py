"""Folders that the tests of the Hub push or publish: a base, its correction in both forms, and changed copies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from glowq.utils.output import EXPORT_MANIFEST
from support.tiny import corrected, logits, tiny_llama

LICENSE = "---\nlicense: other\nlicense_name: tiny\nlicense_link: https://example.org\n---\n# A base\n"
CODE = "from pathlib import Path\n\nPath({marker!r}).write_text('ran')\n"
FIGURES = {"reference": 10.0, "quantized": 12.0, "corrected": 10.8, "recovered": 0.6, "recovered_ci95": [0.5, 0.7]}


def build(folder: Path) -> None:
    """Write all these folders and the logits of the corrected model into `folder`."""
    (tiny_llama(folder / "source") / "README.md").write_text(LICENSE)
    tiny_llama(folder / "another", seed=1)
    model, correction = corrected(folder / "source", "nf4", rank=8)
    for config in (correction.config, model.config.quantization_config):
        config.record(held_out={**FIGURES, "tokens": 4096}, command="glowq correct model")
    correction.save_pretrained(folder / "correction")
    model.save_pretrained(folder / "full")
    save_file({"logits": logits(model)}, folder / "logits.safetensors")
    for name in ("damaged", "scribbled", "edited", "odd", "pickled"):
        shutil.copytree(folder / "correction", folder / name)
    (folder / "damaged" / "glowq.safetensors").write_bytes(b"\x00" * 100)
    (folder / "scribbled" / "README.md").write_text("---\ntags: [\n---\n")
    (folder / "edited" / "README.md").write_text("---\nlanguage: code\n---\nMy own words.\n")
    (folder / "pickled" / "optimizer.pt").write_bytes(b"")
    (folder / "odd" / "notes.log").write_text("mine")
    (folder / "odd" / ".env").write_text("SECRET=1")
    (folder / "odd" / "LICENSE").write_text("free")
    (folder / "odd" / "credentials.json").write_text("{}")
    (folder / "odd" / "diary.txt").write_text("mine")
    (folder / "odd" / "private").mkdir()
    (folder / "odd" / "private" / "config.json").write_text("{}")
    (folder / "odd" / "modeling.py").write_text(CODE.format(marker=str(folder / "ran")))
    variant(folder, "correction", "on-gated", base="other/gated")
    variant(folder, "correction", "on-pickled", base="other/pickled-base")
    variant(folder, "full", "code", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (folder / "code" / "code.py").write_text(CODE.format(marker=str(folder / "ran")))
    for name, of in (("pickled-full", "full"), ("pickled-base", "source")):
        variant(folder, of, name)
        (folder / name / "model.safetensors").rename(folder / name / "pytorch_model.bin")
    export(folder / "export", weights="model.onnx")
    export(folder / "adapter", adapter_config="adapter_config.json")


def variant(folder: Path, of: str, name: str, *, base: str | None = None, **changes: Any) -> None:
    """Write a copy with changed fields in its config.json."""
    shutil.copytree(folder / of, folder / name)
    config = {**json.loads((folder / of / "config.json").read_text()), **changes}
    if base is not None:
        config["quantization_config"]["base_model"].update(name=base, revision=None)
    (folder / name / "config.json").write_text(json.dumps(config))


def export(folder: Path, **files: str) -> None:
    """Write the folder of an export. Its JSON files name the local folder as the base model, as an adapter does."""
    folder.mkdir()
    for name in files.values():
        (folder / name).write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    manifest = {"to": "onnx", "files": {name: 1 for name in files.values()}}
    (folder / EXPORT_MANIFEST).write_text(json.dumps(manifest))
    (folder / "left.txt").write_text("not of the export")
