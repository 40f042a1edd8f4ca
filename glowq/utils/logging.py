"""Progress bars, and a context manager that hides messages of loggers that a user cannot act on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["progress", "quiet"]


def progress(*, total: int | None, desc: str, unit: str) -> Any:
    """Return a tqdm progress bar on stderr that appears after two seconds.

    The bar is hidden if stderr is not a terminal or HF_HUB_DISABLE_PROGRESS_BARS is set.
    """
    from huggingface_hub.utils.tqdm import tqdm  # not at the top of the file, because this import is slow

    hidden = not sys.stderr.isatty() or None
    return tqdm(total=total, desc=desc, unit=unit, delay=2, leave=False, disable=hidden, name="glowq")


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Inside this context, the loggers with these names show only errors."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
