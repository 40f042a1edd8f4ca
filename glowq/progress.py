"""Progress bars: on a terminal, after two seconds, and never where the usual Hugging Face switches say so."""

from __future__ import annotations

import sys
from typing import Any

from huggingface_hub.utils.tqdm import tqdm

__all__ = ["progress"]


def progress(*, total: int | None, desc: str, unit: str) -> Any:
    """A tqdm bar on stderr; silent off a terminal or under HF_HUB_DISABLE_PROGRESS_BARS."""
    hidden = not sys.stderr.isatty() or None
    return tqdm(total=total, desc=desc, unit=unit, delay=2, leave=False, disable=hidden, name="glowq")
