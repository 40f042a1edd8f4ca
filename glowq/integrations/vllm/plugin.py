"""glowq as a vLLM plugin: `vllm serve CORRECTED` serves either saved form; vLLM itself calls `register`.

`config` says which layers carry a correction, `linear` computes it (the right factor once for a fused layer, as for q,
k and v), and `loader` reads it.
"""

from __future__ import annotations

from ...utils.logging import quiet
from ...utils.versions import warn_untested

__all__ = ["register"]

_TESTED = ">=0.32,<0.33"


def register() -> None:
    """Make glowq's quantization known to vLLM; vLLM's entry point `vllm.general_plugins` calls it in every process.

    A plugin cannot choose the loader of a model, and a user should not have to. So the default loader is replaced by a
    subclass that does as vLLM's own for every model but a corrected one.
    """
    warn_untested("vllm", _TESTED, "if the server does not start, or answers wrongly, please report it")
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader

    from .config import LOAD_FORMAT, GlowQQuantizationConfig
    from .loader import GlowQModelLoader

    register_quantization_config("glowq")(GlowQQuantizationConfig)
    with quiet("vllm.model_executor.model_loader"):  # warns that the name is taken
        register_model_loader(LOAD_FORMAT)(GlowQModelLoader)
