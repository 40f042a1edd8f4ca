"""glowq gives quantized language models their accuracy back with group-shared low-rank correction."""

from __future__ import annotations

__version__ = "0.1.0"

from .config import GlowQConfig
from .correction import Correction
from .errors import GlowQError
from .groups import Group, find_groups
from .integrations.transformers import correct, load_correction
from .runtime import detach, disabled

__all__ = [
    "Correction",
    "GlowQConfig",
    "GlowQError",
    "Group",
    "__version__",
    "correct",
    "detach",
    "disabled",
    "find_groups",
    "load_correction",
]
