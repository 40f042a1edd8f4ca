"""The fastest kernels: the quantization libraries', some of which rewrite their weight, and those of glowq_kernels."""

from __future__ import annotations

from torch import nn

from ..errors import RepackedWeightError
from ..quantizers.model import quantized_modules
from .fused import fuse, is_fused

__all__ = ["refuse_rewritten", "use_fast_kernels"]

_RELEASED = "glowq_released"


def use_fast_kernels(model: nn.Module) -> int:
    """Let every quantized layer run the fastest kernel that there is for it on the device that it is on now.

    On a CPU those are the quantization libraries' own. Some rewrite their weight at the first forward, so that it
    cannot be read back exactly; glowq keeps those away. Call this on a model that is loaded to be run: where such a
    kernel is let in, the model can no longer be corrected, dequantized or saved; nor compiled, for torch.compile does
    not see that bitsandbytes' weights are rewritten.

    On a GPU with triton, corrected layers of bitsandbytes' 4 bits and of GPTQ's 4 bits generate through kernels that
    correct in the same launch, see `glowq.runtime.fused.fuse`. They change no weight, and all of that stays possible.

    Args:
        model: quantized, with or without a correction.

    Returns:
        How many modules take another kernel from the next forward on; 0 where each had its fastest already.
    """
    taken = fuse(model)
    for name, backend in quantized_modules(model).items():
        module = model.get_submodule(name)
        # What is fused must go on being readable: the kernels read the weight as the library packed it.
        if not is_fused(module) and backend.release(module):
            setattr(module, _RELEASED, True)
            taken += 1
    return taken


def refuse_rewritten(model: nn.Module) -> None:
    """Refuse to read or save what a kernel may have rewritten.

    Raises:
        RepackedWeightError: `use_fast_kernels` let such kernels in.
    """
    if any(hasattr(module, _RELEASED) for module in model.modules()):
        raise RepackedWeightError(
            "glowq.use_fast_kernels let kernels rewrite this model's weights, and none can be read back exactly: load "
            "the model again to correct, dequantize or save it."
        )
