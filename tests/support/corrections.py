"""Changes of saved corrections on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def changed(whole: Path, copy: Path, change: Any) -> Path:
    """Copy a saved correction and change its stored quantization config."""
    shutil.copytree(whole, copy)
    config = json.loads((copy / "config.json").read_text())
    change(config["quantization_config"])
    (copy / "config.json").write_text(json.dumps(config))
    return copy
