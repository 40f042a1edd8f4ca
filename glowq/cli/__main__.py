"""`python -m glowq.cli`: the same as the `glowq` command."""

from __future__ import annotations

from .app import main

main()
