"""Two transformers quantizers: one delegates to another, one is for models that transformers did not quantize."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.base import HfQuantizer

from ...errors import ConfigError

__all__ = ["DelegatingHfQuantizer", "LibraryHfQuantizer", "Refusal"]

_KEPT = {"requires_calibration", "remove_quantization_config", "get_modules_to_not_convert"}


class DelegatingHfQuantizer(HfQuantizer):
    """Delegates every public attribute and method of `HfQuantizer` to `base`, except those in `_KEPT`.

    The names are read from `HfQuantizer`, so that the class fits every version of transformers.

    Attributes:
        base: the quantizer that is delegated to; subclasses set it.
    """

    base: Any


def _attribute(name: str) -> property:
    return property(lambda self: getattr(self.base, name))


def _method(name: str) -> Any:
    def method(self: DelegatingHfQuantizer, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.base, name)(*args, **kwargs)

    method.__name__ = name
    method.__doc__ = "Delegated to `base`."
    return method


for _name, _value in vars(HfQuantizer).items():
    if not _name.startswith("_") and _name not in _KEPT:
        _is_method = callable(_value) and not isinstance(_value, type)
        setattr(DelegatingHfQuantizer, _name, _method(_name) if _is_method else _attribute(_name))
DelegatingHfQuantizer.__abstractmethods__ = frozenset()


class Refusal:
    """A result of `is_serializable` that raises `ConfigError` when it is used as a truth value.

    transformers calls `is_serializable` for every model, but ignores the result for a model with a PEFT adapter,
    because it then saves only the adapter. If `is_serializable` itself raised, the adapter could not be saved either.
    """

    def __init__(self, message: str) -> None:
        self.message = message

    def __bool__(self) -> bool:
        raise ConfigError(self.message)


class LibraryHfQuantizer(HfQuantizer):
    """The quantizer of a model that its own library quantized; it refuses to save the model.

    Without it, transformers would silently save tensors that cannot be loaded again.
    """

    def __init__(self) -> None:
        super().__init__(None, pre_quantized=True)  # type: ignore[arg-type]

    def is_serializable(self, *args: Any, **kwargs: Any) -> Any:
        """A `Refusal`, whose message says what to do instead."""
        return Refusal(
            "this model was quantized by its own library and not by transformers, so that it cannot be saved in one "
            "piece. Save its correction (Correction.save_pretrained), and the base as its library does."
        )

    @property
    def is_trainable(self) -> bool:
        """True, because transformers sets no limit for a model that it did not quantize."""
        return True
