"""The reports of `glowq compare`: rows of tables, JSON, Markdown and plots.

This package may import every package."""
