"""Export formats by name, and the one that needs no other project: dense weights with the correction merged in.

May import the core packages and `integrations.transformers`."""
