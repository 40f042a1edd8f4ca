"""Models inside of other modules: compiled models, PEFT adapters, and wrappers of other libraries."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModuleError
from ..utils.checks import check_module

__all__ = ["correctable", "uncompiled", "underlying"]


def correctable(model: Any) -> nn.Module:
    """Return the model whose modules have the names that a correction uses: `model`, or what torch.compile wraps.

    Raises:
        UnsupportedModuleError: see `underlying`; or `model` carries a PEFT adapter, or wraps a transformers model. The
            message says what to give instead.
    """
    found = underlying(model)
    if hasattr(found, "peft_config") or getattr(found, "_hf_peft_config_loaded", False):
        raise UnsupportedModuleError(
            f"the model carries a PEFT adapter ({type(found).__name__}), which renames modules and changes what they "
            "read. Correct the base, or attach its correction, first; then add the adapter. (To take an adapter off: "
            "model.unload() of a PeftModel, model.delete_adapter(name) of a transformers model.)"
        )
    inside = [name for name, part in found.named_modules() if isinstance(part, PreTrainedModel)]
    if inside and not isinstance(found, PreTrainedModel):
        raise UnsupportedModuleError(
            f"{type(found).__name__} wraps a {type(found.get_submodule(inside[0])).__name__}: give that model itself, "
            f"model.get_submodule({inside[0]!r})."
        )
    return found


def underlying(model: Any) -> nn.Module:
    """Return `model`, or what torch.compile wraps.

    Raises:
        UnsupportedModuleError: `model` is not a torch module, or a part of it is compiled on its own.
    """
    found = check_module(model)
    if _is_compiled(found):
        found = cast(nn.Module, found._orig_mod)
    compiled = next((name for name, part in found.named_modules() if _is_compiled(part)), None)
    if compiled is not None:
        raise UnsupportedModuleError(
            f"{compiled} is compiled on its own, which renames its modules. Correct the model, or attach its "
            "correction, first; then compile its parts."
        )
    return found


def uncompiled() -> AbstractContextManager[Any]:
    """Inside this context, compiled models run as they are written.

    A hook that records what it sees must run in Python; torch.compile would compile it with the model.
    """
    if "torch._dynamo" not in sys.modules:  # nothing can be compiled yet, and importing it takes a second
        return nullcontext()
    import torch

    return torch.compiler.set_stance("force_eager")


def _is_compiled(module: nn.Module) -> bool:
    if "torch._dynamo" not in sys.modules:
        return False
    from torch._dynamo import OptimizedModule

    return isinstance(module, OptimizedModule)
