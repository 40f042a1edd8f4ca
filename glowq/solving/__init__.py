"""Linear algebra that turns a weight error and its moments into nested low-rank factors, without models, files or text.

This package may import only `errors`."""
