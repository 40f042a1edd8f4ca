"""Text in, token batches out: sources of text, tokenizing, splitting, and the overlap of two texts.

May import `errors` only."""
