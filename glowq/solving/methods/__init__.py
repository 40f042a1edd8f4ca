"""The solver methods: all use the same solver, with other statistics, another grouping or another use of a budget.

A file of this folder registers each method as a `Method`, and is imported here. This package may import `errors` and
`solving`."""

from . import baselines, fisher, glowq, published

__all__ = ["baselines", "fisher", "glowq", "published"]
