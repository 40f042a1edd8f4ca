"""Make "glowq" a quantization method of transformers, without importing transformers.

transformers has no entry point for plugins, and its registry of quantizers imports every quantization library that is
installed, which takes seconds. So glowq does not import the registry: it adds itself as soon as other code imports the
registry, for example the first `from_pretrained`, or at once if the registry is imported already.
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
    """Register glowq's config and quantizer, now or as soon as transformers' registry is imported.

    glowq also registers its own quantizers for HQQ and packed compressed-tensors models, some of which transformers
    loads wrongly. A second call does nothing.
    """
    registry = sys.modules.get(_REGISTRY)
    if registry is not None and not getattr(registry.__spec__, "_initializing", False):
        _register(registry)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """An import hook that finds transformers' registry as Python does, and registers glowq after executing it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The registry's spec, whose loader registers glowq after it executes the module; None for other modules."""
        if fullname != _REGISTRY:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            # Hide the libraries' messages about missing optional kernels: a user can do nothing about them.
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
        """Creates the real quantizer, whose module is imported only when the first corrected model is loaded."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            from .quantizer import GlowQHfQuantizer

            return GlowQHfQuantizer(*args, **kwargs)  # type: ignore[abstract]

    registry.register_quantization_config("glowq")(GlowQConfig)
    registry.register_quantizer("glowq")(GlowQHfQuantizer)
    registry.AUTO_QUANTIZER_MAPPING.update(own_quantizers())
