"""Helpers that do not depend on quantization: output folders, Hub access, logging, versions, argument checks.

This package may import only `errors`."""
