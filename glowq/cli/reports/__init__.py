"""What `glowq compare` writes: rows of tables, JSON, Markdown and pictures.

May import everything."""
