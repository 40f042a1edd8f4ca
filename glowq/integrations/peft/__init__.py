"""Write corrections as PEFT adapters, and read adapters as corrections.

May import the core packages, `integrations.transformers` and `integrations.export`."""
