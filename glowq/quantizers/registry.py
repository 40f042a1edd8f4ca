"""Base quantizers: how each library's module is recognised, read back, and made safe.

A backend is one file in this folder that calls `register` once. Nothing else in glowq knows a quantizer's name.
"""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from torch import Tensor, nn

from ..errors import UnknownBaseError
from .base import Backend, Scheme, StoredModule

__all__ = [
    "backend_of",
    "base_config",
    "base_names",
    "check_installed",
    "find_backend",
    "is_calibrated",
    "is_installed",
    "method_of",
    "methods",
    "own_quantizers",
    "register",
    "stored_base",
    "stored_scheme",
    "with_calibration",
]

_REGISTRY: dict[str, Backend] = {}


def register(cls: type[Backend]) -> type[Backend]:
    """Class decorator: make a backend known under its `name`."""
    _REGISTRY[cls.name] = cls()
    return cls


@cache
def _discover() -> None:
    libraries = importlib.import_module(f"{__package__}.libraries")
    for entry in pkgutil.iter_modules(libraries.__path__):
        if not entry.name.startswith("_"):
            importlib.import_module(f"{libraries.__name__}.{entry.name}")


def _backends() -> Iterator[Backend]:
    _discover()
    yield from _REGISTRY.values()


def find_backend(module: nn.Module) -> Backend | None:
    """The backend that owns `module`, or None where it is not a quantized linear layer."""
    return next((backend for backend in _backends() if backend.matches(module)), None)


def method_of(config: Any) -> str:
    """The `quant_method` of a transformers quantization config, an object or its dict; a name stays what it is."""
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", config)
    return str(getattr(method, "value", method))


def backend_of(config: Any) -> Backend | None:
    """The backend behind a quantization config or its `quant_method`, or None where glowq has none."""
    method = method_of(config)
    return next((backend for backend in _backends() if method in backend.methods), None)


def is_calibrated(config: Any) -> bool:
    """Whether a library needs text to quantize as `config` says, and `config` names none."""
    backend = backend_of(config)
    return backend is not None and backend.calibrated(config)


def own_quantizers() -> dict[str, Any]:
    """`quant_method` -> the transformers quantizer that glowq puts in the place of transformers' own, if it has one."""
    return {method: quantizer for backend in _backends() for method, quantizer in backend.quantizers().items()}


def with_calibration(config: Any, sequences: Tensor) -> Any:
    """A copy of `config` that quantizes with token ids (n, length), where it `is_calibrated`; else `config` itself."""
    backend = backend_of(config)
    return config if backend is None else backend.with_calibration(config, sequences)


def stored_base(config: Any) -> Any:
    """What config.json stores of the `config` that quantized: its settings, without the text."""
    backend = backend_of(config)
    return config if backend is None else backend.stored_config(config)


def stored_scheme(config: Any, module: StoredModule) -> tuple[Backend, Scheme] | None:
    """The backend and the settings of a module that only its checkpoint's headers are known of; None: of no backend.

    Raises:
        BackendError: see `Backend.stored_scheme`.
    """
    for backend in (backend for backend in _backends() if method_of(config) in backend.methods):
        scheme = backend.stored_scheme(module, config)
        if scheme is not None:
            return backend, scheme
    return None


def methods() -> list[str]:
    """Every `quant_method` whose models glowq corrects as they are quantized."""
    return sorted({method for backend in _backends() for method in backend.methods} - {"dense"})


def is_installed(backend: Backend) -> bool:
    """Whether a backend's library is there; it is not imported."""
    try:
        return importlib.util.find_spec(backend.package) is not None
    except ModuleNotFoundError:  # of "optimum.quanto", where even optimum is absent
        return False


def check_installed(backend: Backend, wanted_by: str) -> None:
    """Refuse where a backend's library is absent.

    Args:
        wanted_by: what needs it, for the message ("base 'nf4'").

    Raises:
        UnknownBaseError: the library is not installed; the message says which extra installs it.
    """
    if not is_installed(backend):
        raise UnknownBaseError(
            f"{wanted_by} needs {backend.package}, which is not installed: pip install 'glowq[{backend.extra}]'"
        )


def _presets() -> dict[str, Backend]:
    return {preset: backend for backend in _backends() for preset in backend.presets}


def base_names() -> list[str]:
    """Every name that `--base` accepts."""
    return sorted(_presets())


def base_config(name: str) -> Any:
    """The transformers quantization config behind a `--base` name.

    Raises:
        UnknownBaseError: no such name, or the library behind it is not installed (the message says which extra).
    """
    presets = _presets()
    if name not in presets:
        near = get_close_matches(name, presets, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownBaseError(f"unknown base quantizer {name!r}; expected one of {', '.join(sorted(presets))}.{hint}")
    backend = presets[name]
    check_installed(backend, f"base {name!r}")
    return backend.presets[name]()
