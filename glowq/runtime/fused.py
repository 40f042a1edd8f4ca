"""A corrected member in one launch: a Triton kernel that multiplies by the packed weight and ends with the left factor.

The member keeps its hook, which corrects whatever the library's own forward returns. Fusing gives the member another
forward: where the kernels can do the whole of it, it does, and tells the hook so; everywhere else it is the library's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn
from torch.autograd import forward_ad

import glowq_kernels

from ..quantizers.base import FusedProduct
from ..quantizers.registry import find_backend
from . import operators
from .hook import MemberHook

__all__ = ["FusedForward", "fuse", "is_fused"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_GPUS = ("cuda", "xpu")  # ROCm's devices go by CUDA's name


def fuse(model: nn.Module) -> int:
    """Let the corrected members of `model` run through the kernels that correct in the launch that multiplies.

    Those are the members whose weight is on a GPU now (for tests, on the CPU too if triton is in its interpreter) in a
    packing that such a kernel reads. They take the kernel for inputs of at most `operators.FEW` tokens of float16,
    bfloat16 or float32, where no gradient is wanted, under `torch.no_grad`: one launch for the right product of a group
    (in `torch.inference_mode` of each member, see `SharedCorrection`) and one for each member. For everything else they
    compute what they did, with the hook's correction, and so they do under autocast, in a compiler's trace, and while
    somebody's hook is on a factor. Other hooks of a member see the corrected output of a kernel. No weight is changed;
    `detach` takes everything back.

    Args:
        model: carries a correction.

    Returns:
        How many members take the kernels from the next forward on that did not before.
    """
    return sum(_fuse(module) for module in model.modules())


def is_fused(module: nn.Module) -> bool:
    """Whether `fuse` has given this module its forward."""
    return isinstance(module.__dict__.get("forward"), FusedForward)


class FusedForward:
    """The forward of a fused member, kept as the module's attribute of that name: it copies and pickles with it.

    Args:
        module: the member.
        hook: its hook.
        product: see `Backend.fused_product`.
    """

    def __init__(self, module: nn.Module, hook: MemberHook, product: FusedProduct) -> None:
        self._module: Any = module
        self._hook: MemberHook | None = hook
        self._product = product
        self._before: Callable[..., Any] | None = module.__dict__.get("forward")  # accelerate's, of a resident module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs:
            output = self._fused(args[0])
            if output is not None:
                return output
        if self._before is not None:
            return self._before(*args, **kwargs)
        return type(self._module).forward(self._module, *args, **kwargs)

    def takes_no_tokens(self) -> bool:
        """Whether the kernel accepts the member's tensors as they are: it checks them before it looks for tokens."""
        hook = self._hook
        assert hook is not None
        right = hook.container.right.factor
        x = torch.empty((0, right.shape[1]), dtype=torch.float32, device=right.device)
        with torch.no_grad():
            return self._launched(hook, x, lambda: x.new_empty((0, len(right)))) is not None

    def remove(self) -> None:
        """Give the module its own forward back; where somebody has wrapped this one, it does what that does."""
        module, self._hook = self._module, None
        if module.__dict__.get("forward") is self:
            if self._before is None:
                del module.forward
            else:
                module.forward = self._before

    def _fused(self, x: Any) -> Tensor | None:
        """The corrected output, or None where the library and the hook have to compute it."""
        hook = self._hook
        if hook is None or not _is_taken(x) or not hook.container.enabled or hook.container.watched:
            return None
        if self._module.__dict__.get("forward") is not self:
            return None  # wrapped: what the hook will see as the input need not be what came here
        output = self._launched(hook, x, lambda: hook.container.right_product(hook.index, x))
        if output is not None:
            hook.settle(x)
        return output

    def _launched(self, hook: MemberHook, x: Tensor, right: Callable[[], Tensor]) -> Tensor | None:
        launch = self._product(self._module, x)
        if launch is None:
            return None
        left: Any = hook.container._factors[1 + hook.index]
        factor, scale = left._parameters["factor"], left._buffers["scale"]
        try:
            output = launch(product=right(), left=factor, left_scale=None if scale is None else scale.float())
        except glowq_kernels.KernelError:  # raised before anything is launched
            return None
        return output.to(x.dtype)


def _fuse(module: nn.Module) -> bool:
    hooks = [hook for hook in module._forward_hooks.values() if isinstance(hook, MemberHook)]
    if len(hooks) != 1 or is_fused(module) or not _is_resident(module) or hooks[0].container.watched:
        return False
    backend, (hook,) = find_backend(module), hooks
    product = None if backend is None else backend.fused_product(module)
    if product is None or not _can_run(next(chain(module.parameters(), module.buffers())).device):
        return False
    forward = FusedForward(module, hook, product)
    if not forward.takes_no_tokens():
        return False
    module.forward = forward
    hook.container._handles.append(forward)
    return True


def _is_resident(module: nn.Module) -> bool:
    """Whether the module's weight stays where it is: accelerate hooks modules that it offloads, and others as well."""
    hook = getattr(module, "_hf_hook", None)
    return hook is None or (type(hook) is AlignDevicesHook and not hook.offload)


def _is_taken(x: Any) -> bool:
    """Whether an input goes to the kernels: a few tokens, on a device of theirs, of which only the values matter."""
    if type(x) is not Tensor or torch.is_grad_enabled() or _is_recorded():
        return False
    return (
        x.dtype in _DTYPES
        and x.dim() > 0
        and 0 < x.numel() <= operators.FEW * x.shape[-1]
        and x.layout is torch.strided
        and not x.is_neg()
        and _can_run(x.device)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _is_recorded() -> bool:
    """Whether torch's operators are traced, transformed or counted, which it cannot do with these kernels."""
    return bool(
        torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _can_run(device: torch.device) -> bool:
    """Whether the kernels run on tensors of `device`; says once why they do not where there is a GPU."""
    return (device.type in _GPUS or (device.type == "cpu" and _interpreted())) and operators._kernels() is not None


@cache
def _interpreted() -> bool:
    return glowq_kernels.interpreted()
