"""Measurements on calibration text: input moments, output gradients, gains of groups, and distillation of factors.

This package may import `evaluation`, `solving` and everything that `evaluation` may import."""
