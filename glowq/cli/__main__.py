"""`python -m glowq.cli`: the same as the `glowq` command."""

from __future__ import annotations

from .entry import main

main()
