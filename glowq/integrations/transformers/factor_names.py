"""Keep the names of factors when transformers renames the tensors of a model that it saves.

Some models have other names in memory than in their files (vision-language models: "model.language_model.layers" and
"language_model.model.layers"). transformers renames their tensors on loading, and renames them back on saving: also the
factors, which are named in config.json and are not renamed on loading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...artifact.factor_layout import FACTOR_KEYS
from ...errors import CorrectionError

__all__ = ["keep_factor_names"]


_KEEPING: dict[type, type] = {}  # class of transformers' conversions -> its subclass that leaves factors alone


def keep_factor_names(model: Any, factors: Mapping[str, Tensor]) -> None:
    """Let the conversions of a model's names, which transformers reverses on saving, leave factors alone.

    Args:
        model: a transformers model with a correction.
        factors: tensors of the correction under the names that the files will have.

    Raises:
        CorrectionError: transformers would save a factor under another name all the same.
    """
    from transformers.core_model_loading import revert_weight_conversion

    for conversion in getattr(model, "_weight_conversions", None) or ():
        conversion.__class__ = _keeping(type(conversion))
    saved = revert_weight_conversion(model, dict(factors))
    lost = next((name for name in factors if name not in saved), None)
    if lost is not None:
        raise CorrectionError(
            f"transformers would save the factor {lost!r} under another name, so that the model could not be loaded. "
            "Save the correction instead (Correction.save_pretrained), or the model with save_original_format=False."
        )


def _keeping(kind: Any) -> Any:
    """A subclass of a conversion that leaves the names of factors as they are, and so does its reverse."""
    if kind in _KEEPING.values():
        return kind
    if kind in _KEEPING:
        return _KEEPING[kind]

    class Keeping(kind):  # type: ignore[misc]
        __slots__ = ()  # or the class of a conversion could not be changed to this one

        def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
            if re.search(FACTOR_KEYS, source_key):
                return source_key, None
            found: tuple[str, str | None] = super().rename_source_key(source_key)
            return found

        def reverse_transform(self) -> Any:
            reverse = super().reverse_transform()
            reverse.__class__ = _keeping(type(reverse))
            return reverse

    _KEEPING[kind] = Keeping
    return Keeping
