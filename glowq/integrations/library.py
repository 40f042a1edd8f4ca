"""What transformers cannot save: models that their own library quantized, and how saving them is refused."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.base import HfQuantizer

from ..errors import ConfigError

__all__ = ["LibraryHfQuantizer", "Refusal"]


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
