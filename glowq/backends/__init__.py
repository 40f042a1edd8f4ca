"""Base quantizers: how each library's module is recognised, read back, and made safe.

A backend is one file in this folder that calls `register` once. Nothing else in glowq knows a quantizer's name.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..errors import NonFiniteError, UnknownBaseError

__all__ = [
    "Backend",
    "base_config",
    "base_names",
    "find_backend",
    "prepare_model",
    "quantized_modules",
    "read_weight",
    "register",
]


class Backend(ABC):
    """One base quantizer's module kind.

    Attributes:
        name: how `glowq inspect` calls it.
        package: the import name of the library that owns the module.
        extra: the pip extra of glowq that installs the library.
        presets: `--base` names -> factory of the transformers quantization config that produces such modules.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    extra: ClassVar[str]
    presets: ClassVar[Mapping[str, Callable[[], Any]]] = MappingProxyType({})

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is this backend's; must not import the library."""

    @abstractmethod
    def weight(self, module: Any) -> Tensor:
        """The weight that the module's kernel multiplies by, shape (out_features, in_features), any float dtype.

        Raises:
            BackendError: the weight cannot be read exactly.
        """

    @abstractmethod
    def codes(self, module: Any) -> Tensor:
        """The stored integer codes, any shape: what a fingerprint is taken of."""

    @abstractmethod
    def scheme(self, module: Any) -> str:
        """The quantization settings in words, equal for equal settings ("nf4, blocks of 64")."""

    @abstractmethod
    def packed_bytes(self, module: Any) -> int:
        """Bytes of the weight at its nominal bit width plus its scales, however the library stores it."""

    def prepare(self, module: Any) -> None:  # noqa: B027 - most libraries set no trap
        """Close the library's traps before the module is read, run or saved; called once after loading."""

    def features(self, module: Any) -> tuple[int, int]:
        """(out_features, in_features)."""
        return int(module.out_features), int(module.in_features)


_REGISTRY: dict[str, Backend] = {}


def register(cls: type[Backend]) -> type[Backend]:
    """Class decorator: make a backend known under its `name`."""
    _REGISTRY[cls.name] = cls()
    return cls


@cache
def _discover() -> None:
    for entry in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{entry.name}")


def _backends() -> Iterator[Backend]:
    _discover()
    yield from _REGISTRY.values()


def find_backend(module: nn.Module) -> Backend | None:
    """The backend that owns `module`, or None where it is not a quantized linear layer."""
    return next((backend for backend in _backends() if backend.matches(module)), None)


def quantized_modules(model: nn.Module) -> dict[str, Backend]:
    """Every quantized linear layer of `model`, name -> backend, in module order."""
    found = ((name, find_backend(module)) for name, module in model.named_modules())
    return {name: backend for name, backend in found if backend is not None}


def prepare_model(model: nn.Module) -> dict[str, Backend]:
    """Make every quantized module of `model` safe to read, run and save; returns `quantized_modules(model)`."""
    modules = quantized_modules(model)
    for name, backend in modules.items():
        backend.prepare(model.get_submodule(name))
    return modules


def read_weight(backend: Backend, name: str, module: nn.Module) -> Tensor:
    """A quantized module's dequantized weight, offloaded modules included.

    Returns:
        float32 tensor of shape (out_features, in_features).

    Raises:
        NonFiniteError: the weight holds NaN or Inf (damaged scales).
    """
    with align_module_device(module), torch.no_grad():
        weight = backend.weight(module).detach().to(torch.float32)
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(
            f"{name}: the dequantized weight holds NaN or Inf; its quantization scales are damaged. Quantize it again."
        )
    return weight


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
    if importlib.util.find_spec(backend.package) is None:
        raise UnknownBaseError(
            f"base {name!r} needs {backend.package}, which is not installed: pip install 'glowq[{backend.extra}]'"
        )
    return backend.presets[name]()
