"""Doors to other projects; nothing in glowq but the command line and the public names imports them."""
