"""From sources to token batches: reading text and token ids, tokenizing, splitting, and the overlap of two texts.

This package may import only `errors`."""
