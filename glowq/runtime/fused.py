"""A corrected member in one launch: a Triton kernel multiplies by the packed weight and adds the left product.

`fuse` gives a member another forward. For inputs that the kernels support, this forward computes the corrected output,
and the member's hook returns it unchanged. For other inputs, it calls the library's forward, and the hook corrects the
output as before.
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
from . import products
from .hook import MemberHook

__all__ = ["FusedForward", "fuse", "is_fused"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_GPUS = ("cuda", "xpu")  # torch calls ROCm's devices "cuda" too


def fuse(model: nn.Module) -> int:
    """Let corrected members of `model` use kernels that multiply and correct in one launch.

    A member is fused if its weight is on a GPU now, in a packing that such a kernel reads. (For tests, the CPU counts
    as well if triton runs its interpreter.) A fused member uses the kernel for inputs of at most `products.FEW` tokens
    of float16, bfloat16 or float32, under `torch.no_grad` or `torch.inference_mode`. A group then takes one launch for
    its right product (in `torch.inference_mode` one for each member, see `SharedCorrection`) and one launch for each
    member. For other inputs the member runs the library's forward and its hook adds the correction. It does the same
    under autocast, while a compiler traces, and while a factor has a hook. Other hooks of a member get the corrected
    output of the kernel. No weight is changed, and `detach` undoes everything.

    Args:
        model: a model with a correction.

    Returns:
        The number of members that this call has fused.
    """
    return sum(_fuse(module) for module in model.modules())


def is_fused(module: nn.Module) -> bool:
    """Whether `fuse` has replaced the forward of this module."""
    return isinstance(module.__dict__.get("forward"), FusedForward)


class FusedForward:
    """The forward of a fused member.

    It is stored as the module's attribute `forward`, so that it is copied and pickled with the module.

    Args:
        module: the member.
        hook: the member's hook.
        product: see `Backend.fused_product`.
    """

    def __init__(self, module: nn.Module, hook: MemberHook, product: FusedProduct) -> None:
        self._module: Any = module
        self._hook: MemberHook | None = hook
        self._product = product
        self._before: Callable[..., Any] | None = module.__dict__.get("forward")  # set by accelerate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs:
            output = self._fused(args[0])
            if output is not None:
                return output
        if self._before is not None:
            return self._before(*args, **kwargs)
        return type(self._module).forward(self._module, *args, **kwargs)

    def takes_no_tokens(self) -> bool:
        """Whether the kernel accepts the member's tensors. For an input of no tokens it only checks the tensors."""
        hook = self._hook
        assert hook is not None
        right = hook.container.right.factor
        x = torch.empty((0, hook.container.group.in_features), dtype=torch.float32, device=right.device)
        with torch.no_grad():
            return self._launched(hook, x, lambda: x.new_empty((0, len(right)))) is not None

    def remove(self) -> None:
        """Restore the module's own forward. If other code has wrapped this one, it stays and calls the module's own."""
        module, self._hook = self._module, None
        if module.__dict__.get("forward") is self:
            if self._before is None:
                del module.forward
            else:
                module.forward = self._before

    def _fused(self, x: Any) -> Tensor | None:
        """The corrected output, or None if the library's forward and the hook must compute it."""
        hook = self._hook
        if hook is None or not _is_supported(x) or not hook.container.enabled or hook.container.watched:
            return None
        if self._module.__dict__.get("forward") is not self:
            return None  # other code has wrapped this forward: the hook's input may be another tensor than x
        output = self._launched(hook, x, lambda: hook.container.right_product(hook.index, x))
        if output is not None:
            hook.settle(x)
        return output

    def _launched(self, hook: MemberHook, x: Tensor, right: Callable[[], Tensor]) -> Tensor | None:
        launch = self._product(self._module, x)
        if launch is None:
            return None
        left: Any = hook.container._factors[1 + hook.index]
        factor, scale, multipliers = left._parameters["factor"], left._buffers["scale"], left._buffers["multipliers"]
        scale = None if scale is None else scale.float()
        try:
            output = launch(product=right(), left=factor, left_scale=scale, left_multipliers=multipliers)
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
    """Whether the module is not offloaded. accelerate also sets hooks on modules that it does not offload."""
    hook = getattr(module, "_hf_hook", None)
    return hook is None or (type(hook) is AlignDevicesHook and not hook.offload)


def _is_supported(x: Any) -> bool:
    """Whether the kernels support an input: few tokens, a device of the kernels, no gradient, trace or autocast."""
    if type(x) is not Tensor or torch.is_grad_enabled() or _is_recorded():
        return False
    return (
        x.dtype in _DTYPES
        and x.dim() > 0
        and 0 < x.numel() <= products.FEW * x.shape[-1]
        and x.layout is torch.strided
        and not x.is_neg()
        and _can_run(x.device)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _is_recorded() -> bool:
    """Whether torch is tracing, transforming or counting its operators, which is not possible with these kernels."""
    return bool(
        torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _can_run(device: torch.device) -> bool:
    """Whether the kernels run on tensors of `device`. If they cannot run on a GPU, a warning says why, once."""
    return (device.type in _GPUS or (device.type == "cpu" and _interpreted())) and products.kernels() is not None


@cache
def _interpreted() -> bool:
    return glowq_kernels.interpreted()
