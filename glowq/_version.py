"""The version of glowq, in a file that imports nothing."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
