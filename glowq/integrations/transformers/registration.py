"""Make "glowq" a quantization method of transformers, without importing transformers.

transformers has no plug-in entry point, and its registry of quantizers imports every quantization library that is
installed, which takes seconds. So glowq adds itself to the registry when something else imports it, as the first
`from_pretrained` does; where it is imported already, at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from ...utils.logging import quiet

__all__ = ["register_with_transformers"]

_REGISTRY = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register glowq's config and quantizer, now or as soon as transformers' registry is imported; again does nothing.

    HQQ and packed compressed-tensors models get quantizers of ours too, where transformers loads them wrongly.
    """
    registry = sys.modules.get(_REGISTRY)
    if registry is not None and not getattr(registry.__spec__, "_initializing", False):
        _register(registry)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds transformers' registry where Python does, and registers glowq once it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The registry's spec, whose loader registers glowq at its end; None for every other module."""
        if fullname != _REGISTRY:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            # What the libraries say of optional kernels that they do not find is nothing that a user could act on.
            with quiet("torchao", "torch.utils._pytree"):
                execute(module)
            _register(module)
            sys.meta_path.remove(self)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(registry: ModuleType) -> None:
    if "glowq" in registry.AUTO_QUANTIZER_MAPPING:
        return
    from ...artifact.config import GlowQConfig
    from ...quantizers.registry import own_quantizers

    class GlowQHfQuantizer(registry.HfQuantizer):  # type: ignore[name-defined, misc]
        """Makes the real quantizer, whose module is imported when the first corrected model is loaded."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            from .quantizer import GlowQHfQuantizer

            return GlowQHfQuantizer(*args, **kwargs)  # type: ignore[abstract]

    registry.register_quantization_config("glowq")(GlowQConfig)
    registry.register_quantizer("glowq")(GlowQHfQuantizer)
    registry.AUTO_QUANTIZER_MAPPING.update(own_quantizers())
