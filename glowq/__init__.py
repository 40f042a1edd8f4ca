"""glowq gives quantized language models their accuracy back with group-shared low-rank correction."""

from __future__ import annotations

__version__ = "0.1.0"

from .progress import quiet

# transformers imports every quantization library that is installed; what they say of optional kernels that they do
# not find is nothing that a user of glowq could act on.
with quiet("torchao", "torch.utils._pytree"):
    from .config import GlowQConfig
    from .correction import Correction
    from .errors import GlowQError
    from .fast_kernels import use_fast_kernels
    from .groups import Group, find_groups
    from .integrations.transformers import correct, load_correction
    from .runtime import detach
    from .switching import disabled, set_enabled

__all__ = [
    "Correction",
    "GlowQConfig",
    "GlowQError",
    "Group",
    "__version__",
    "correct",
    "detach",
    "disabled",
    "find_groups",
    "load_correction",
    "set_enabled",
    "use_fast_kernels",
]
