"""Code for gptqmodel's GPTQ and AWQ modules: both have CPU kernels that rewrite the weight at the first forward."""

from __future__ import annotations

from typing import Any

__all__ = ["keep_readable", "let_rewrite"]


def keep_readable(module: Any) -> None:
    """Disable the kernel that gptqmodel selects if no gradient is needed, because this kernel rewrites the weight."""
    if getattr(module, "linear_mode", "none") is None:
        module.linear_mode = "train"


def let_rewrite(module: Any) -> bool:
    """Undo `keep_readable` on the devices that have such a kernel, CPU and XPU.

    Returns:
        Whether anything was undone.
    """
    if getattr(module, "linear_mode", "none") != "train" or module.qweight.device.type not in ("cpu", "xpu"):
        return False
    module.linear_mode = None
    return True
