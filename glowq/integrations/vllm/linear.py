"""A corrected linear layer of vLLM: the base's kernel, and one pair of factors for all modules that the layer fuses.

vLLM computes q, k and v in one layer, gate and up in another. Such a layer gets one right factor, which stacks the
right factors of all its groups, and one left factor, where the rows of a member are zero outside of the columns of its
group. If one group covers the layer, these are the factors of the group, and B x is computed once. If members are in
different groups, or in none, the left factor is block diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from vllm.model_executor.layers.linear import (
    WEIGHT_LOADER_V2_SUPPORTED,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.utils import set_weight_attrs

from ...artifact.factor_files import StoredFactors
from ...errors import ConfigError, UnsupportedModuleError
from ...factors.group import Group

__all__ = ["GlowQLinearMethod"]


RIGHT, LEFT = "glowq_right", "glowq_left"


class GlowQLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """The base's method, with the correction added to its output.

    Attributes:
        base: the base's own method for the layer.
        members: checkpoint names of the modules that the layer computes, in the order of its outputs.
        groups: the groups that have a member in the layer, and their ranks.
    """

    def __init__(self, base: Any, members: Sequence[str], groups: Sequence[tuple[Group, int]]) -> None:
        self.base = base
        self.members = tuple(members)
        self.groups = tuple(groups)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Any,
        **attributes: Any,
    ) -> None:
        """Create the base's tensors, then this process's part of the factors.

        Raises:
            UnsupportedModuleError: the correction does not fit the layer.
        """
        if type(self.base).__name__ in WEIGHT_LOADER_V2_SUPPORTED:  # vLLM tests only the name of `GlowQLinearMethod`
            weight_loader = getattr(layer, "weight_loader_v2", weight_loader)
        shape = (input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype)
        self.base.create_weights(layer, *shape, weight_loader=weight_loader, **attributes)
        self._check(layer, input_size)
        rank = sum(rank for _, rank in self.groups)
        right = Parameter(torch.empty(rank, input_size_per_partition, dtype=params_dtype), requires_grad=False)
        left = Parameter(torch.empty(sum(output_partition_sizes), rank, dtype=params_dtype), requires_grad=False)
        # In a layer that is split by outputs, A is split, and every process holds the whole of B. In a layer that is
        # split by inputs, B is split, and the sum over processes that completes Q x completes A (B x) too.
        if isinstance(layer, RowParallelLinear):
            set_weight_attrs(right, {"input_dim": 1})
        else:
            set_weight_attrs(left, {"output_dim": 0})
        layer.register_parameter(RIGHT, right)
        layer.register_parameter(LEFT, left)

    def load(self, layer: Any, factors: StoredFactors) -> None:
        """Read the layer's factors, and keep this process's part of them.

        Raises:
            NonFiniteError: a factor holds NaN or Inf.
        """
        entries = factors.read({group.name: rank for group, rank in self.groups})
        right = torch.cat([entry.right for entry in entries])
        layer.weight_loader(layer.glowq_right, right)
        for member, width, shard in zip(self.members, self._widths(layer), self._shards(layer), strict=True):
            left, start = right.new_zeros(width, len(right)), 0
            for entry in entries:
                if member in entry.lefts:
                    left[:, start : start + entry.rank] = entry.lefts[member]
                start += entry.rank
            layer.weight_loader(layer.glowq_left, left, *shard)
        layer.glowq_loaded = True

    def process_weights_after_loading(self, layer: Any) -> None:
        """Let the base process its tensors.

        Raises:
            ConfigError: the factors were not read, because vLLM reloads the model's weights in place.
        """
        if not layer.__dict__.pop("glowq_loaded", False):
            raise ConfigError(
                f"the factors of {', '.join(self.members)} were not read: a corrected model's weights cannot be "
                "reloaded in place. Start vLLM again."
            )
        self.base.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Q x + A (B x), computed with this process's part; x has shape (tokens, d)."""
        correction = F.linear(F.linear(x, layer.glowq_right), layer.glowq_left)
        return correction.add_(self.base.apply(layer, x, bias))

    def _check(self, layer: nn.Module, input_size: int) -> None:
        widths = dict(zip(self.members, self._widths(layer), strict=True))
        for group, _ in self.groups:
            if group.in_features != input_size:
                raise UnsupportedModuleError(
                    f"group {group.name!r} reads {group.in_features} features, but its layer in vLLM reads "
                    f"{input_size}: the model and the correction in config.json do not belong together."
                )
            for member, (width, _) in group.shapes.items():
                if widths.get(member, width) != width:
                    raise UnsupportedModuleError(
                        f"{member} has {width} outputs in the correction, but {widths[member]} in vLLM's "
                        f"{type(layer).__name__}; this layer cannot be corrected there. Serve with transformers."
                    )

    def _widths(self, layer: Any) -> list[int]:
        """Number of outputs of each member, over all processes."""
        if isinstance(layer, QKVParallelLinear):
            heads = (layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads)
            sizes = (layer.head_size, layer.head_size, layer.v_head_size)
            widths = [count * size for count, size in zip(heads, sizes, strict=True)]
        elif isinstance(layer, MergedColumnParallelLinear):
            widths = list(layer.output_sizes)
        else:
            widths = [layer.output_size]
        if len(self.members) == 1:
            return [sum(widths)]
        if len(self.members) != len(widths):
            raise UnsupportedModuleError(
                f"vLLM fuses {', '.join(self.members)} into a {type(layer).__name__} of {len(widths)} parts, which "
                "glowq cannot divide among them. Serve with transformers."
            )
        return widths

    def _shards(self, layer: nn.Module) -> list[tuple[Any, ...]]:
        """For each member, the arguments of the layer's weight loader that name the member's part of the layer."""
        if len(self.members) == 1:
            return [()]
        ids = ("q", "k", "v") if isinstance(layer, QKVParallelLinear) else range(len(self.members))
        return [(shard,) for shard in ids]
