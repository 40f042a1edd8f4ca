"""`python -m glowq.cli`: the same as the `glowq` command."""

from . import main

main()
