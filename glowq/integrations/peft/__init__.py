"""Write corrections as PEFT adapters, and read adapters as corrections.

This package may import the core packages, `integrations.transformers` and `integrations.export`."""
