"""Fast kernels: those of glowq_kernels, and those of the quantization libraries, some of which rewrite their weight."""

from __future__ import annotations

from torch import nn

from ..errors import RepackedWeightError
from ..quantizers.model import quantized_modules
from ..utils.checks import check_module
from .fused import fuse, is_fused

__all__ = ["refuse_rewritten", "use_fast_kernels"]

_RELEASED = "glowq_released"


def use_fast_kernels(model: nn.Module) -> int:
    """Let every quantized layer use the fastest kernel that is available for it on its current device.

    On a CPU these are kernels of the quantization libraries. Some of them rewrite the weight at the first forward, so
    that it cannot be read back exactly. glowq disables those kernels, and this function enables them again. Call it on
    a model that you only want to run. With such a kernel the model can no longer be corrected, dequantized or saved. It
    can no longer be compiled either, because torch.compile does not notice that bitsandbytes rewrites its weights.

    On a GPU with triton, corrected 4-bit layers of bitsandbytes and GPTQ generate with kernels that multiply and
    correct in one launch, see `glowq.runtime.fused.fuse`. These kernels change no weight, so that the model can still
    be corrected, dequantized, saved and compiled.

    Args:
        model: a quantized model, with or without a correction.

    Returns:
        The number of modules that use another kernel from the next forward on; 0 if each used its fastest already.
    """
    taken = fuse(check_module(model))
    for name, backend in quantized_modules(model).items():
        module = model.get_submodule(name)
        # A fused module must keep its weight as the library packed it, because the fused kernel reads that.
        if not is_fused(module) and backend.release(module):
            setattr(module, _RELEASED, True)
            taken += 1
    return taken


def refuse_rewritten(model: nn.Module) -> None:
    """Refuse to read or save weights that a kernel may have rewritten.

    Raises:
        RepackedWeightError: `use_fast_kernels` has enabled such kernels.
    """
    if any(hasattr(module, _RELEASED) for module in model.modules()):
        raise RepackedWeightError(
            "glowq.use_fast_kernels let kernels rewrite this model's weights, and none can be read back exactly: load "
            "the model again to correct, dequantize or save it."
        )
