"""The vLLM plugin: `vllm serve CORRECTED` serves a corrected model in either saved form. vLLM calls `register`.

`config` selects the layers that carry a correction, `linear` computes the correction (the right product once for a
fused layer, such as q, k and v), and `loader` reads the factors.
"""

from __future__ import annotations

from ...utils.logging import quiet
from ...utils.versions import warn_untested

__all__ = ["register"]

_TESTED = ">=0.32,<0.33"


def register() -> None:
    """Register glowq's quantization with vLLM; the entry point `vllm.general_plugins` calls this in every process.

    A plugin cannot choose the loader of a model, and users should not have to choose one. So a subclass replaces vLLM's
    default loader; for models without a correction it does what the default loader does.
    """
    warn_untested("vllm", _TESTED, "if the server does not start, or answers wrongly, please report it")
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader

    from .config import LOAD_FORMAT, GlowQQuantizationConfig
    from .loader import GlowQModelLoader

    register_quantization_config("glowq")(GlowQQuantizationConfig)
    with quiet("vllm.model_executor.model_loader"):  # vLLM warns that a loader of this name exists
        register_model_loader(LOAD_FORMAT)(GlowQModelLoader)
