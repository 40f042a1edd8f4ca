"""Base quantizers: how each library's module is recognised, read back, and made safe.

A backend is one file in this folder that calls `register` once. Nothing else in glowq knows a quantizer's name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..errors import BackendError, NonFiniteError, UnknownBaseError
from ..versions import warn_untested
from ._backend import Backend, FusedProduct, Scheme, StoredModule

__all__ = [
    "Backend",
    "FusedProduct",
    "Scheme",
    "StoredModule",
    "backend_of",
    "base_config",
    "base_names",
    "check_installed",
    "check_scales",
    "find_backend",
    "is_calibrated",
    "is_installed",
    "method_of",
    "methods",
    "own_quantizers",
    "packed_bytes",
    "prepare_model",
    "quantized_modules",
    "read_weight",
    "refuse_misloaded",
    "register",
    "stored_base",
    "stored_scheme",
    "with_calibration",
]

_MISREAD = "if weights are read back wrongly, please report it"


_REGISTRY: dict[str, Backend] = {}


def register(cls: type[Backend]) -> type[Backend]:
    """Class decorator: make a backend known under its `name`."""
    _REGISTRY[cls.name] = cls()
    return cls


@cache
def _discover() -> None:
    for entry in pkgutil.iter_modules(__path__):
        if not entry.name.startswith("_"):
            importlib.import_module(f"{__name__}.{entry.name}")


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


def quantized_modules(model: nn.Module) -> dict[str, Backend]:
    """Every quantized linear layer of `model`, name -> backend, in module order."""
    found = ((name, find_backend(module)) for name, module in model.named_modules())
    return {name: backend for name, backend in found if backend is not None}


def refuse_misloaded(model: nn.Module) -> None:
    """Refuse a model that transformers loaded from a checkpoint whose weights it cannot read.

    Raises:
        BackendError: its weights are not those of the checkpoint; the message says how to load it.
    """
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    quantizer = getattr(quantizer, "base", quantizer)
    own = own_quantizers().get(method_of(config))
    if own is not None and getattr(quantizer, "pre_quantized", False) and not issubclass(own, type(quantizer)):
        raise BackendError(
            f"the model was loaded before glowq was imported, by {type(quantizer).__name__} of transformers, which "
            f"gives {method_of(config)} models other weights than their files hold. Import glowq first, then load it."
        )


def prepare_model(model: nn.Module) -> dict[str, Backend]:
    """Make every quantized module of `model` safe to read, run and save; returns `quantized_modules(model)`."""
    modules = quantized_modules(model)
    dtype = getattr(model, "dtype", torch.float32)
    for name, backend in modules.items():
        warn_untested(backend.package, backend.tested, _MISREAD)
        module = model.get_submodule(name)
        with _naming(name), align_module_device(module):
            backend.prepare(module, dtype)
    return modules


def packed_bytes(model: nn.Module) -> int:
    """Bytes of all quantized weights at their nominal width, with their scales and zero points."""
    return sum(backend.packed_bytes(model.get_submodule(name)) for name, backend in quantized_modules(model).items())


def check_scales(model: nn.Module) -> None:
    """Refuse damaged scales before anything is computed with them: after a forward they would look like other damage.

    Raises:
        BackendError: a module cannot be read exactly, or a scale is zero where the library writes none.
        NonFiniteError: a scale is NaN or Inf.
    """
    for name, backend in quantized_modules(model).items():
        module = model.get_submodule(name)
        with _naming(name), align_module_device(module):
            for scale in backend.scales(module):
                _check_scales(backend, name, scale)


def read_weight(backend: Backend, name: str, module: nn.Module) -> Tensor:
    """A quantized module's dequantized weight, offloaded modules included.

    Returns:
        float32 tensor of shape (out_features, in_features).

    Raises:
        BackendError: the weight cannot be read exactly, or a scale is zero where the library writes none.
        NonFiniteError: the scales or the weight hold NaN or Inf.
    """
    with _naming(name), align_module_device(module), torch.no_grad():
        for scale in backend.scales(module):
            _check_scales(backend, name, scale)
        weight = backend.weight(module).detach().to(torch.float32)
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(f"{name}: the dequantized weight holds NaN or Inf. Quantize the model again.")
    return weight


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say which module a backend refused."""
    try:
        yield
    except BackendError as error:
        raise type(error)(f"{name}: {error}") from error


def _check_scales(backend: Backend, name: str, scales: Tensor) -> None:
    values = scales.float()
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"{name}: its quantization scales hold NaN or Inf. Download or quantize the model again.")
    if not backend.zero_scales and not bool(values.all()):
        raise BackendError(
            f"{int((values == 0).sum())} of its {values.numel()} quantization scales are zero, which "
            f"{backend.name} never writes: the checkpoint is damaged. Download or quantize the model again."
        )


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
