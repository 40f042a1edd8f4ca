"""The place of a base quantizer in a model that its own library quantized or loaded, without transformers."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.base import HfQuantizer

from ..errors import ConfigError

__all__ = ["LibraryHfQuantizer"]


class LibraryHfQuantizer(HfQuantizer):
    """Refuses what transformers would otherwise do in silence: save tensors that nothing can load again."""

    def __init__(self) -> None:
        super().__init__(None, pre_quantized=True)  # type: ignore[arg-type]

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Never.

        Raises:
            ConfigError: always, with what can be done.
        """
        raise ConfigError(
            "this model was quantized by its own library and not by transformers, so that it cannot be saved in one "
            "piece. Save its correction (Correction.save_pretrained), and the base as its library does."
        )

    @property
    def is_trainable(self) -> bool:
        """Transformers was never asked."""
        return True
