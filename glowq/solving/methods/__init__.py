"""The solver methods by name: one shared solve, with other statistics, another grouping or another use of a budget.

A method is a `Method` that a file of this folder registers and this page imports; may import `errors` and `solving`."""

from . import baselines, glowq, published

__all__ = ["baselines", "glowq", "published"]
