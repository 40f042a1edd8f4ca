"""The `glowq` command: options, output, and one file for each command in `commands`.

May import everything; nothing imports it. A command imports torch and transformers only when it runs."""
