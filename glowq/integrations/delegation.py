"""A transformers quantizer that is another one's, but for what a subclass overrides."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.base import HfQuantizer

__all__ = ["DelegatingHfQuantizer"]

_KEPT = {"requires_calibration", "remove_quantization_config", "get_modules_to_not_convert"}


class DelegatingHfQuantizer(HfQuantizer):
    """Every public attribute is that of `base`, whatever this version of transformers knows of.

    Attributes:
        base: the quantizer that answers; subclasses set it.
    """

    base: Any


def _attribute(name: str) -> property:
    return property(lambda self: getattr(self.base, name))


def _method(name: str) -> Any:
    def method(self: DelegatingHfQuantizer, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.base, name)(*args, **kwargs)

    method.__name__ = name
    method.__doc__ = "The base's answer."
    return method


for _name, _value in vars(HfQuantizer).items():
    if not _name.startswith("_") and _name not in _KEPT:
        _is_method = callable(_value) and not isinstance(_value, type)
        setattr(DelegatingHfQuantizer, _name, _method(_name) if _is_method else _attribute(_name))
DelegatingHfQuantizer.__abstractmethods__ = frozenset()
