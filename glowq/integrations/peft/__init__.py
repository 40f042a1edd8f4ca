"""Corrections as PEFT adapters, written and read.

May import the core packages, `integrations.transformers` and `integrations.export`."""
