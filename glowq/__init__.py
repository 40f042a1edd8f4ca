"""glowq corrects quantized language models with low-rank factors that modules with the same input share.

Importing glowq registers it with transformers and loads nothing else: each public name is imported at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .integrations.transformers.registration import register_with_transformers

if TYPE_CHECKING:
    from .artifact.config import GlowQConfig
    from .artifact.correction import Correction
    from .errors import GlowQError
    from .factors.group import Group
    from .integrations.transformers.memory import correct, load_correction
    from .models.tracing import find_groups
    from .runtime.attach import detach
    from .runtime.fast_kernels import use_fast_kernels
    from .runtime.switching import disabled, set_enabled

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
    "set_enabled",
    "use_fast_kernels",
]

_MODULES = {
    "Correction": "artifact.correction",
    "GlowQConfig": "artifact.config",
    "GlowQError": "errors",
    "Group": "factors.group",
    "correct": "integrations.transformers.memory",
    "detach": "runtime.attach",
    "disabled": "runtime.switching",
    "find_groups": "models.tracing",
    "load_correction": "integrations.transformers.memory",
    "set_enabled": "runtime.switching",
    "use_fast_kernels": "runtime.fast_kernels",
}

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
