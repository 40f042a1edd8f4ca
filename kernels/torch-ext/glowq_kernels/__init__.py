"""Triton kernels for quantized linear layers with a low-rank correction. A group of layers shares the right factor.

Importing this package needs only torch; the first launch imports triton. `unavailable()` returns the reason why the
kernels cannot run on this machine. `twins` has every function in plain torch.
"""

from . import twins
from .availability import interpreted, unavailable
from .checks import KernelError
from .gptq import gptq_linear
from .left_product import left_add_
from .nf4 import nf4_linear
from .right_product import right

__all__ = ["KernelError", "gptq_linear", "interpreted", "left_add_", "nf4_linear", "right", "twins", "unavailable"]
