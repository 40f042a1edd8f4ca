"""glowq inside transformers: the quantizer that `from_pretrained` uses, saving, and merging into dense weights.

May import the core packages."""
