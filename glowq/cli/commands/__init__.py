"""One small file per command. It calls the same functions as a Python user.

A command may import every package. It imports files that need torch or transformers only inside functions, so that
--help starts fast."""
