"""Quantizers of transformers that load what transformers itself loads wrongly or not at all."""

from __future__ import annotations

# glowq registers these quantizers when transformers' registry is imported. A file of this folder that imported it first
# would be asked for its class before it is defined.
import transformers.quantizers.auto  # noqa: F401
