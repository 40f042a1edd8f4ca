"""`python -m glowq`: the same as the `glowq` command."""

from __future__ import annotations

from .cli.entry import main

main()
