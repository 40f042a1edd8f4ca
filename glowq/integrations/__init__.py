"""Doors to other projects, a folder or a file each; the other packages never import this one.

A door may import the core packages, and of the other doors only `transformers` and `export`."""
