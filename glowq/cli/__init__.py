"""The `glowq` command: its options, its output, and one file per subcommand in `commands`.

This package may import every package; no other package imports it. A command imports torch and transformers only when
it runs."""
