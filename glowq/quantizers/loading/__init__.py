"""Quantizers of transformers that load what transformers itself loads wrongly or not at all."""

from __future__ import annotations
