"""`python -m glowq`: the same as the `glowq` command."""

from .cli import main

main()
