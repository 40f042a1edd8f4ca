"""The fastest kernels of the quantization libraries, some of which rewrite the weight that they multiply by."""

from __future__ import annotations

from torch import nn

from .backends import quantized_modules
from .errors import RepackedWeightError

__all__ = ["refuse_rewritten", "use_fast_kernels"]

_RELEASED = "glowq_released"


def use_fast_kernels(model: nn.Module) -> int:
    """Let every quantization library run the fastest kernel that it has for this machine.

    Some kernels rewrite their weight at the first forward, so that it cannot be read back exactly; glowq keeps those
    away. Call this on a model that is loaded to be run: it can no longer be corrected, dequantized or saved; nor
    compiled, for torch.compile does not see that bitsandbytes' weights are rewritten.

    Args:
        model: quantized, with or without a correction.

    Returns:
        How many modules take another kernel from the next forward on; 0 where each had its fastest already.
    """
    released = 0
    for name, backend in quantized_modules(model).items():
        module = model.get_submodule(name)
        if backend.release(module):
            setattr(module, _RELEASED, True)
            released += 1
    return released


def refuse_rewritten(model: nn.Module) -> None:
    """Refuse to read or save what a kernel may have rewritten.

    Raises:
        RepackedWeightError: `use_fast_kernels` changed the model.
    """
    if any(hasattr(module, _RELEASED) for module in model.modules()):
        raise RepackedWeightError(
            "glowq.use_fast_kernels let kernels rewrite this model's weights, and none can be read back exactly: load "
            "the model again to correct, dequantize or save it."
        )
