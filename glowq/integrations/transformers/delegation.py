"""Transformers quantizers that answer for another one, or for a library that transformers was never asked about."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.base import HfQuantizer

from ...errors import ConfigError

__all__ = ["DelegatingHfQuantizer", "LibraryHfQuantizer", "Refusal"]

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


class Refusal:
    """A no to "can this model be saved?" that says why as soon as it counts.

    transformers asks every model, and then does not look at the answer for one with a PEFT adapter, of which it saves
    the adapter alone: to raise at the question would refuse that too.
    """

    def __init__(self, message: str) -> None:
        self.message = message

    def __bool__(self) -> bool:
        raise ConfigError(self.message)


class LibraryHfQuantizer(HfQuantizer):
    """Refuses what transformers would otherwise do in silence: save tensors that nothing can load again."""

    def __init__(self) -> None:
        super().__init__(None, pre_quantized=True)  # type: ignore[arg-type]

    def is_serializable(self, *args: Any, **kwargs: Any) -> Any:
        """Never, but for an adapter; says what can be done."""
        return Refusal(
            "this model was quantized by its own library and not by transformers, so that it cannot be saved in one "
            "piece. Save its correction (Correction.save_pretrained), and the base as its library does."
        )

    @property
    def is_trainable(self) -> bool:
        """Transformers was never asked."""
        return True
