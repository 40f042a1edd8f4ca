"""Matrix products in float32, where a processor multiplies half precision slowly.

On a CPU without AVX512-BF16 or AMX, torch multiplies bfloat16 (and on most CPUs float16) in a plain loop, 5 to 40 times
slower than float32. `fast_products` computes these products in float32 and rounds each result to the dtype that the
model expects. The model is not changed, and one weight at a time is converted.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ..quantizers.model import quantized_modules
from ..utils.processor import float32_is_faster, slowdown

__all__ = ["fast_products", "slow_here"]

_HALF = (torch.bfloat16, torch.float16)

# The products below autograd: its backward passes call the same ones.
_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "linear",
        "matmul",
        "mm",
        "addmm",
        "_addmm_activation",
        "bmm",
        "baddbmm",
        "mv",
        "addmv",
        "dot",
        "convolution",
        "convolution_backward",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    )
)
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

_state = threading.local()


@contextmanager
def fast_products(*models: nn.Module, half: bool = False) -> Iterator[None]:
    """Inside this context, the products of models whose dtype is slow on their device are computed in float32.

    The result of each product is rounded to the models' dtype, so that all else stays as it is. If no model needs it,
    nothing happens.

    Args:
        models: the models that will run, on any devices.
        half: whether a model of half precision will run that is not loaded yet.
    """
    used = [dtype for dtype in _HALF if half or any(_computes_in(model, dtype) for model in models)]
    slow = frozenset(dtype for dtype in used if float32_is_faster(dtype))
    with ExitStack() as stack:
        if slow - getattr(_state, "active", frozenset()):
            stack.callback(setattr, _state, "active", getattr(_state, "active", frozenset()))
            _state.active = slow | getattr(_state, "active", frozenset())
            stack.enter_context(_Float32Products(slow))
        yield


def _computes_in(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the model computes in `dtype` on the CPU: a tensor that lies there, or is offloaded, has that dtype."""
    tensors = (tensor for group in (model.parameters(), model.buffers()) for tensor in group)
    kept = {tensor.dtype for tensor in tensors if tensor.device.type in ("cpu", "meta")}
    return dtype in kept


def slow_here(model: nn.Module) -> str | None:
    """Say that the layers of a quantized model are slow on this processor outside of `fast_products`, if they are."""
    for name in quantized_modules(model):
        module: Any = model.get_submodule(name)
        dtype: Any = getattr(module, "compute_dtype", None) or getattr(model, "dtype", torch.float32)
        if float32_is_faster(dtype) and any(tensor.device.type in ("cpu", "meta") for tensor in module.parameters()):
            return (
                f"this processor multiplies {str(dtype).removeprefix('torch.')} matrices {slowdown(dtype):.0f} times "
                "slower than float32. glowq's own steps use float32, but the model itself will be slow here in other "
                "programs. With --base nf4 its layers compute in float32 on such a processor."
            )
    return None


class _Float32Products(TorchDispatchMode):
    """Computes the products of `dtypes` in float32, and rounds the results."""

    def __init__(self, dtypes: frozenset[torch.dtype]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes = dtypes

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        dtype = self._slow_dtype(args) if func.overloadpacket in _PRODUCTS and "out" not in kwargs else None
        if dtype is None:
            return func(*args, **kwargs)

        def widened(value: Any) -> Any:
            return value.float() if isinstance(value, Tensor) and value.dtype is dtype else value

        def rounded(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.dtype is torch.float32 else value

        output = func(*tree_map(widened, args), **tree_map(widened, kwargs))
        if func.overloadpacket is _ATTENTION:  # its second output, the log of the sums, is always float32
            return rounded(output[0]), output[1]
        return tree_map(rounded, output)

    def _slow_dtype(self, args: Sequence[Any]) -> torch.dtype | None:
        """The dtype of a product's inputs if it is a slow one, and all inputs are plain tensors of it on the CPU."""
        tensors = [value for value in args if isinstance(value, Tensor) and value.is_floating_point()]
        if not tensors or tensors[0].dtype not in self.dtypes:
            return None
        plain = (type(value) in (Tensor, nn.Parameter) and value.is_cpu for value in tensors)
        return tensors[0].dtype if all(plain) else None
