"""glowq inside transformers: the quantizer that `from_pretrained` uses, saving, and merging into dense weights.

This package may import the core packages."""
