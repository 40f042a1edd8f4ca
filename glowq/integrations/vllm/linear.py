"""A corrected linear layer of vLLM: the base's kernel, and one pair of factors for whatever the layer fuses.

vLLM computes q, k and v in one layer, gate and up in another. Such a layer gets one right factor, the rows of all its
groups, and one left factor, each member's rows under the columns of its group. So one group that covers the layer is
computed as it is, B x once; members in groups of their own, or in none, make the left factor block diagonal.
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
    """The base's method, and the correction added to what it computes.

    Attributes:
        base: the base's own method for the layer.
        members: names in the checkpoint of what the layer computes, in the order of its outputs.
        groups: those with a member in the layer, and their ranks.
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
        """The base's tensors, then this process's part of the factors.

        Raises:
            UnsupportedModuleError: the layer is not the one that the correction was made for.
        """
        if type(self.base).__name__ in WEIGHT_LOADER_V2_SUPPORTED:  # the layer asks that of the name of this class
            weight_loader = getattr(layer, "weight_loader_v2", weight_loader)
        shape = (input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype)
        self.base.create_weights(layer, *shape, weight_loader=weight_loader, **attributes)
        self._check(layer, input_size)
        rank = sum(rank for _, rank in self.groups)
        right = Parameter(torch.empty(rank, input_size_per_partition, dtype=params_dtype), requires_grad=False)
        left = Parameter(torch.empty(sum(output_partition_sizes), rank, dtype=params_dtype), requires_grad=False)
        # Split by outputs, A is and B is whole in every process; split by inputs, B is, and the sum over processes
        # that makes Q x out of its parts makes A (B x) too.
        if isinstance(layer, RowParallelLinear):
            set_weight_attrs(right, {"input_dim": 1})
        else:
            set_weight_attrs(left, {"output_dim": 0})
        layer.register_parameter(RIGHT, right)
        layer.register_parameter(LEFT, left)

    def load(self, layer: Any, factors: StoredFactors) -> None:
        """Read the layer's factors, of which it keeps this process's part.

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
        """What the base does with its tensors.

        Raises:
            ConfigError: vLLM reloads the model's weights in place, which leaves the factors undefined.
        """
        if not layer.__dict__.pop("glowq_loaded", False):
            raise ConfigError(
                f"the factors of {', '.join(self.members)} were not read: a corrected model's weights cannot be "
                "reloaded in place. Start vLLM again."
            )
        self.base.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Q x + A (B x) of this process's part; x is (tokens, d)."""
        correction = F.linear(F.linear(x, layer.glowq_right), layer.glowq_left)
        return correction.add_(self.base.apply(layer, x, bias))

    def _check(self, layer: nn.Module, input_size: int) -> None:
        widths = dict(zip(self.members, self._widths(layer), strict=True))
        for group, _ in self.groups:
            if group.in_features != input_size:
                raise UnsupportedModuleError(
                    f"group {group.name!r} reads {group.in_features} features, but vLLM's layer of it {input_size}: "
                    "config.json and the correction in it are not of one model."
                )
            for member, (width, _) in group.shapes.items():
                if widths.get(member, width) != width:
                    raise UnsupportedModuleError(
                        f"{member} has {width} outputs in the correction, but {widths[member]} in vLLM's "
                        f"{type(layer).__name__}; this layer cannot be corrected there. Serve with transformers."
                    )

    def _widths(self, layer: Any) -> list[int]:
        """Outputs of each member, all processes together."""
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
        """What the layer's weight loader takes besides the tensor, to know whose it is."""
        if len(self.members) == 1:
            return [()]
        ids = ("q", "k", "v") if isinstance(layer, QKVParallelLinear) else range(len(self.members))
        return [(shard,) for shard in ids]
