"""The vLLM plugin: `vllm serve` runs a corrected model in either saved form. vLLM calls `register`.

This package may import the core packages. `register` imports vllm only when it is called, because every vLLM process
imports this package as an entry point.
"""

from .plugin import register

__all__ = ["register"]
