"""Integrations with other projects, one folder or file for each project. Of the other packages only `cli` imports them.

An integration may import the core packages, and of the other integrations only `transformers` and `export`."""
