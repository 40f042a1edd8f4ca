"""glowq's commands inside optimum-cli; two of these files are installed in optimum's own namespace.

May import everything, glowq only inside functions where optimum-cli imports the file at its start."""
