"""Saved corrections: config.json, factor files, fingerprint, provenance, model card, upload to the Hub.

This package may import `errors`, `utils`, `factors`, `quantizers`, `selection` and `evaluation`."""
