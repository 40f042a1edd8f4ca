"""glowq as a vLLM plugin: `vllm serve` of a corrected model in either saved form; vLLM calls `register`.

May import the core packages; vllm only inside functions, for an entry point is imported by every vLLM process.
"""

from .plugin import register

__all__ = ["register"]
