"""compressed-tensors (llm-compressor's checkpoints): integers packed into int32, int8, and float8 weights.

transformers loads the weights in packed form, as `nn.Linear` modules without a dense weight. When the model runs for
the first time, compressed-tensors replaces the packed tensors by a dense weight. This backend reads both states. It
packs a dense weight again with the library's own code, and refuses it if unpacking does not give exactly the same
weight.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ...errors import BackendError, RepackedWeightError
from ..base import Backend, Scheme, StoredModule
from ..registry import register

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_DENSE = "load the checkpoint with CompressedTensorsConfig(dequantize=True) and correct it with dense=True"


@register
class CompressedTensors(Backend):
    """`nn.Linear` modules to which compressed-tensors added a `quantization_scheme` for their weights."""

    name = "compressed-tensors"
    package = "compressed_tensors"
    extra = "compressed-tensors"
    tested = ">=0.20,<0.21"
    methods = ("compressed-tensors",)
    saves = "files"  # after its first forward the model's own state is dense
    loads_experts = True

    def quantizers(self) -> dict[str, type]:
        from ..loading.divided_experts import loading_experts
        from ..loading.zero_points import PackedZeroPointsHfQuantizer

        return {"compressed-tensors": loading_experts(PackedZeroPointsHfQuantizer)}

    def matches(self, module: nn.Module) -> bool:
        if type(module).__name__ == "CompressedTensorsFP8Linear":
            return True
        if "compressed_tensors" not in sys.modules:
            return False
        from torch import nn

        weights = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        return weights is not None and isinstance(module, nn.Linear)

    def prepare(self, module: Any, dtype: torch.dtype) -> None:
        # In bfloat16, two 8-bit codes far from their zero point can give the same dense weight. So keep the packed
        # tensors before the first forward replaces them.
        if hasattr(module, "quantization_scheme") and not _has_recoverable_codes(module) and _is_packed(module):
            module.glowq_packed = _tensors(module)

    def weight(self, module: Any) -> Tensor:
        self._check(module)
        if not _is_packed(module):
            return module.weight.data
        return _compressor(module).decompress(_tensors(module), module.quantization_scheme)["weight"]

    def codes(self, module: Any) -> list[Tensor]:
        import torch

        packed = self._packed(module)
        names = ("weight_packed", "weight", "weight_zero_point")
        found = [packed[name] for name in names if packed.get(name) is not None]
        return [codes.view(torch.uint8) if codes.is_floating_point() else codes for codes in found]

    def scales(self, module: Any) -> list[Tensor]:
        self._check(module)
        return [module.weight_scale.data]

    def scheme(self, module: Any) -> Scheme:
        self._check(module)
        weights, inputs = module.quantization_scheme.weights, module.quantization_scheme.input_activations
        return _scheme(weights, inputs, weights.group_size == module.in_features)

    def stored_scheme(self, module: StoredModule, config: Mapping[str, Any]) -> Scheme | None:
        if not any(name.startswith("weight_") and name != "weight_shape" for name in module.shapes):
            return None
        settings = _settings_of(module.name, config.get("config_groups") or {})
        if settings is None:
            return None
        found = settings.get("format") or config.get("format")
        if found not in _FORMATS:
            raise BackendError(_unknown_format(found))
        one_group = module.shapes.get("weight_scale", (1,))[-1] == 1
        inputs = settings.get("input_activations")
        return _scheme(_args(settings["weights"]), inputs and _args(inputs), one_group)

    def packed_bytes(self, module: Any) -> int:
        self._check(module)
        weights = module.quantization_scheme.weights
        zeros = 0 if weights.symmetric else module.weight_scale.numel() * weights.num_bits // 8
        return super().packed_bytes(module) + zeros

    def stored_config(self, config: Any) -> Any:
        config = copy.deepcopy(config)
        if config.quantization_config is not None:
            # At the first forward, the library writes "decompressed" into the loaded config. The files stay packed.
            config.quantization_config.quantization_status = _status().COMPRESSED
        return config

    def _packed(self, module: Any) -> dict[str, Tensor]:
        """The module's tensors in the packed form of a checkpoint, name -> tensor. Only the codes in them are exact."""
        import torch

        self._check(module)
        state = _tensors(module)
        if _is_packed(module):
            return state
        if not _has_recoverable_codes(module):
            return self._kept(module)
        compressor, scheme = _compressor(module), module.quantization_scheme
        # Pack in float32: the library's division in bfloat16 is not exact enough to recover every 8-bit code.
        packed = compressor.compress({**state, **_as_float32(state)}, scheme)
        again = compressor.decompress({**packed, "weight_scale": state["weight_scale"]}, scheme)["weight"]
        if not torch.equal(again, state["weight"]):
            raise RepackedWeightError(
                "compressed-tensors made a module's weight dense at an earlier forward, and packing it again does not "
                "give the same weight: it was changed since. Load the model again."
            )
        return packed

    @staticmethod
    def _kept(module: Any) -> dict[str, Tensor]:
        kept: dict[str, Tensor] | None = getattr(module, "glowq_packed", None)
        if kept is None:
            raise RepackedWeightError(
                "compressed-tensors made an asymmetric 8-bit weight dense at an earlier forward, and its codes cannot "
                "be recovered from it. Load the model again and call glowq before its first forward."
            )
        return kept

    @staticmethod
    def _check(module: Any) -> None:
        if type(module).__name__ == "CompressedTensorsFP8Linear":
            raise BackendError(
                "a module was loaded for transformers' float8 kernel, whose layout glowq does not read. Load the model "
                "without use_optimized_inference."
            )
        if _format(module) not in _FORMATS:
            raise BackendError(_unknown_format(_format(module)))
        if module.quantization_status < _status().COMPRESSED:
            raise BackendError(
                "a module's weight is not quantized yet (compressed-tensors' status "
                f"{module.quantization_status.value!r}): save the model with llm-compressor's save_compressed=True and "
                "load what that wrote."
            )
        if _format(module) == "pack-quantized" and not {"weight_packed", "weight_shape"} & module._parameters.keys():
            raise BackendError(
                "a checkpoint names the format pack-quantized but holds dense weights: it was saved after the model's "
                f"first forward. Load the checkpoint that the quantizer wrote, or {_DENSE}."
            )


def _unknown_format(found: Any) -> str:
    return f"compressed-tensors' format {found!r} is none of {', '.join(_FORMATS)}; {_DENSE}."


def _scheme(weights: Any, inputs: Any, one_group: bool) -> Scheme:
    """The scheme of a module.

    Args:
        weights: `QuantizationArgs` of the weights.
        inputs: `QuantizationArgs` of the inputs, or None if they are not quantized.
        one_group: whether one group is a whole row.
    """
    details = ["symmetric" if weights.symmetric else "asymmetric"]
    if weights.strategy == "tensor":
        details.append("one scale in all")
    elif weights.strategy == "block":
        details.append(f"blocks of {' x '.join(map(str, weights.block_structure))}")
    if inputs is not None:
        details.append(f"inputs rounded to {inputs.type}{inputs.num_bits}")
    size = weights.group_size if weights.strategy == "group" and not one_group else None
    return Scheme(f"{weights.type}{weights.num_bits}", weights.num_bits, size, tuple(details))


def _args(stored: Mapping[str, Any]) -> Any:
    """The `QuantizationArgs` that config.json stores, completed with the library's defaults, without importing it."""
    size = stored.get("group_size")
    strategy = "tensor" if size is None else "group" if size > 0 else "channel"
    defaults = {"type": "int", "symmetric": True, "group_size": None, "num_bits": 8, "block_structure": None}
    return SimpleNamespace(**{**defaults, **stored, "strategy": stored.get("strategy") or strategy})


def _settings_of(name: str, groups: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The config group of a linear layer. As in the library, its name comes first, then patterns, then its class."""
    targets = [(target, group) for group in groups.values() for target in group.get("targets", ())]
    found = [group for target, group in targets if target == name]
    found += [group for target, group in targets if target[:3] == "re:" and re.match(target[3:], name)]
    found += [group for target, group in targets if target == "Linear"]
    return next((group for group in found if group.get("weights")), None)


def _status() -> Any:
    from compressed_tensors.quantization import QuantizationStatus

    return QuantizationStatus


def _is_packed(module: Any) -> bool:
    return module.quantization_status == _status().COMPRESSED


def _has_recoverable_codes(module: Any) -> bool:
    """Whether q can be computed from w = (q - z) s in bfloat16: the error 2^-8 |q - z| must be below one half."""
    weights = module.quantization_scheme.weights
    return weights.symmetric or weights.num_bits < 8


def _format(module: Any) -> str:
    from compressed_tensors.compressors.format import infer_module_format

    scheme = module.quantization_scheme
    found = scheme.format or infer_module_format(type(module), scheme)
    return str(getattr(found, "value", found))


def _compressor(module: Any) -> Any:
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(_format(module))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own tensors, name -> data."""
    from compressed_tensors.utils import get_direct_state_dict

    return {name: tensor for name, tensor in get_direct_state_dict(module).items() if tensor is not None}


def _as_float32(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: state[name].float() for name in ("weight", "weight_scale")}
