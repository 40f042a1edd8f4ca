"""What gptqmodel's GPTQ and AWQ modules share: CPU kernels that rewrite the weight at the first forward."""

from __future__ import annotations

from typing import Any

__all__ = ["keep_readable", "let_rewrite"]


def keep_readable(module: Any) -> None:
    """Keep away the kernel that gptqmodel picks by itself where no gradient is wanted; it rewrites its weight."""
    if getattr(module, "linear_mode", "none") is None:
        module.linear_mode = "train"


def let_rewrite(module: Any) -> bool:
    """Undo `keep_readable`; returns whether there was anything to undo.

    There is not on devices that such a kernel does not run on.
    """
    if getattr(module, "linear_mode", "none") != "train" or module.qweight.device.type not in ("cpu", "xpu"):
        return False
    module.linear_mode = None
    return True
