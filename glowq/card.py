"""The model card of a saved correction."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .correction import Correction


def correction_card(correction: Correction) -> str:
    """Text of README.md."""
    return "# glowq correction\n"
