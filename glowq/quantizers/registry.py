"""The registry of backends: find the backend of a module, of a quantization config or of a `--base` name.

A backend is a class in a file of the folder `libraries`, decorated with `register`.
"""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UnknownBaseError
from ..utils.names import unknown_base
from .base import Backend, Scheme, StoredModule

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data.inputs import Samples

__all__ = [
    "backend_of",
    "base_config",
    "base_names",
    "check_installed",
    "find_backend",
    "holds_experts",
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
    """Class decorator: add an instance of a backend to the registry, under its `name`."""
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
    """The backend of `module`, or None if `module` is not a quantized linear layer."""
    return next((backend for backend in _backends() if backend.matches(module)), None)


def holds_experts(stack: Tensor) -> bool:
    """Whether a backend reads this parameter, which holds the matrices of all experts of a layer."""
    return any(backend.holds_experts(stack) for backend in _backends())


def method_of(config: Any) -> str:
    """The `quant_method` of a transformers quantization config (an object or a dict). A name is returned unchanged."""
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", config)
    return str(getattr(method, "value", method))


def backend_of(config: Any) -> Backend | None:
    """The backend for a quantization config or for its `quant_method`, or None if glowq has none."""
    method = method_of(config)
    return next((backend for backend in _backends() if method in backend.methods), None)


def is_calibrated(config: Any) -> bool:
    """Whether quantizing with `config` needs calibration text, and `config` does not name any."""
    backend = backend_of(config)
    return backend is not None and backend.calibrated(config)


def own_quantizers() -> dict[str, Any]:
    """`quant_method` -> transformers quantizer that glowq registers; it replaces transformers' own, if there is one."""
    return {method: quantizer for backend in _backends() for method, quantizer in backend.quantizers().items()}


def with_calibration(config: Any, sequences: Samples) -> Any:
    """Add calibration text to a quantization config.

    Args:
        config: a transformers quantization config.
        sequences: token ids, shape (n, length), int64, or samples of another kind.

    Returns:
        A copy of `config` that calibrates on `sequences`; `config` itself if `is_calibrated` is false for it.

    Raises:
        ConfigError: the base calibrates on text, and the samples are of another kind.
    """
    from ..data.inputs import Inputs

    backend = backend_of(config)
    if backend is None or not is_calibrated(config):
        return config
    if isinstance(sequences, Inputs):
        raise ConfigError(
            f"{method_of(config)} quantizes with text alone, and the calibration is of another kind: quantize the "
            "model by its library first and correct the result, or take another base, such as nf4."
        )
    return backend.with_calibration(config, sequences)


def stored_base(config: Any) -> Any:
    """The form of a base's `config` that config.json stores: its settings, without calibration text."""
    backend = backend_of(config)
    return config if backend is None else backend.stored_config(config)


def stored_scheme(config: Any, module: StoredModule) -> tuple[Backend, Scheme] | None:
    """The backend and the settings of a module, read from its checkpoint's headers alone; None if no backend matches.

    Raises:
        BackendError: see `Backend.stored_scheme`.
    """
    for backend in (backend for backend in _backends() if method_of(config) in backend.methods):
        scheme = backend.stored_scheme(module, config)
        if scheme is not None:
            return backend, scheme
    return None


def methods() -> list[str]:
    """Every `quant_method` whose quantized weights glowq reads directly, sorted; "dense" is not one of them."""
    return sorted({method for backend in _backends() for method in backend.methods} - {"dense"})


def is_installed(backend: Backend) -> bool:
    """Whether a backend's library is installed. The library is not imported."""
    try:
        return importlib.util.find_spec(backend.package) is not None
    except ModuleNotFoundError:  # for "optimum.quanto" if optimum is not installed
        return False


def check_installed(backend: Backend, wanted_by: str) -> None:
    """Raise an error if a backend's library is not installed.

    Args:
        wanted_by: what needs the library, for the message ("base 'nf4'").

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
    """The transformers quantization config for a `--base` name.

    Raises:
        UnknownBaseError: no such name, or its library is not installed (the message names the extra).
    """
    presets = _presets()
    if name not in presets:
        raise UnknownBaseError(unknown_base(name, presets))
    backend = presets[name]
    check_installed(backend, f"base {name!r}")
    return backend.presets[name]()
