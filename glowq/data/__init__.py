"""From text to token batches: sources of text, tokenizing, splitting, and the overlap of two texts.

This package may import only `errors`."""
