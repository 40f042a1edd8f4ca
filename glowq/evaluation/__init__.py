"""Measure how accurate and how fast a model is, independent of how its factors were computed.

This package may import `data`, `models`, `runtime` and everything that those may import."""
