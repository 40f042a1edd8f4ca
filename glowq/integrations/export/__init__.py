"""Export formats by name, and the one format that needs no other project: dense weights with the correction merged.

This package may import the core packages and `integrations.transformers`."""
