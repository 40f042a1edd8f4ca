"""What is shown while work goes on: progress bars on a terminal, and nothing that a user cannot act on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["progress", "quiet"]


def progress(*, total: int | None, desc: str, unit: str) -> Any:
    """A tqdm bar on stderr, after two seconds; silent off a terminal or under HF_HUB_DISABLE_PROGRESS_BARS."""
    from huggingface_hub.utils.tqdm import tqdm  # which takes longer to import than the rest of this file to run

    hidden = not sys.stderr.isatty() or None
    return tqdm(total=total, desc=desc, unit=unit, delay=2, leave=False, disable=hidden, name="glowq")


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Inside this context the loggers of these names show errors only."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
