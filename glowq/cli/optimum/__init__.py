"""glowq's commands in optimum-cli. Two of these files are installed in optimum's own namespace.

These files may import every package. `commands` is imported whenever optimum-cli starts, so it imports glowq only
inside functions, and no torch to declare its options."""
