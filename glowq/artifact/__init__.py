"""A correction at rest: config.json, factor files, fingerprint, provenance, model card, upload to the Hub.

May import `errors`, `utils`, `factors`, `quantizers`, `selection` and `evaluation`."""
