"""compressed-tensors (llm-compressor's checkpoints): integers packed into int32, int8, and float8 weights.

transformers loads them packed, as `nn.Linear` modules without a weight, and compressed-tensors replaces the packed
tensors by a dense weight when the model runs for the first time. Read here in either state: dense weights are
packed again by the library's own code, and refused where that does not give the very same weight.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from ...errors import BackendError, RepackedWeightError
from ..base import Backend, Scheme, StoredModule
from ..registry import register

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_DENSE = "load the checkpoint with CompressedTensorsConfig(dequantize=True) and correct it with dense=True"


@register
class CompressedTensors(Backend):
    """`nn.Linear` that compressed-tensors gave a `quantization_scheme` with weights."""

    name = "compressed-tensors"
    package = "compressed_tensors"
    extra = "compressed-tensors"
    tested = ">=0.20,<0.21"
    methods = ("compressed-tensors",)
    saves = "files"  # after its first forward the model's own state is dense

    def quantizers(self) -> dict[str, type]:
        return {"compressed-tensors": PackedZeroPointsHfQuantizer}

    def matches(self, module: nn.Module) -> bool:
        if type(module).__name__ == "CompressedTensorsFP8Linear":
            return True
        weights = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        return weights is not None and isinstance(module, nn.Linear) and "compressed_tensors" in sys.modules

    def prepare(self, module: Any, dtype: torch.dtype) -> None:
        # In bfloat16 two 8-bit codes that lie far from their zero point can stand for one and the same dense weight.
        if hasattr(module, "quantization_scheme") and not _codes_show_in_weight(module) and _is_packed(module):
            module.glowq_packed = _tensors(module)

    def weight(self, module: Any) -> Tensor:
        self._check(module)
        if not _is_packed(module):
            return module.weight.data
        return _compressor(module).decompress(_tensors(module), module.quantization_scheme)["weight"]

    def codes(self, module: Any) -> list[Tensor]:
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
            # The library writes "decompressed" into the loaded config at the first forward; the files stay packed.
            config.quantization_config.quantization_status = _status().COMPRESSED
        return config

    def _packed(self, module: Any) -> dict[str, Tensor]:
        """The module's tensors as a checkpoint holds them, name -> tensor; only their codes are exact."""
        self._check(module)
        state = _tensors(module)
        if _is_packed(module):
            return state
        if not _codes_show_in_weight(module):
            return self._kept(module)
        compressor, scheme = _compressor(module), module.quantization_scheme
        # In float32: in bfloat16 the library divides too coarsely to find every 8-bit code again.
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
                "be told from it. Load the model again and call glowq before its first forward."
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
    """The scheme of `QuantizationArgs`; `one_group` where a group is a whole row."""
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
    """Stored `QuantizationArgs` with the library's defaults, without the library."""
    size = stored.get("group_size")
    strategy = "tensor" if size is None else "group" if size > 0 else "channel"
    defaults = {"type": "int", "symmetric": True, "group_size": None, "num_bits": 8, "block_structure": None}
    return SimpleNamespace(**{**defaults, **stored, "strategy": stored.get("strategy") or strategy})


def _settings_of(name: str, groups: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The config group of a linear layer: by its name, else by a pattern, else by its class, as the library chooses."""
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


def _codes_show_in_weight(module: Any) -> bool:
    """Whether w = (q - z) s, rounded to bfloat16, tells q: an error of 2^-8 |q - z| must stay below one half."""
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


class PackedZeroPointsHfQuantizer(CompressedTensorsHfQuantizer):
    """transformers' own, with room for packed zero points.

    compressed-tensors 0.18 to 0.20 lays modules out for loading with zero points that are not packed, while the files
    hold them packed as the codes are, and from_pretrained stops at a size mismatch. Does nothing where the layout fits.
    """

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, **kwargs)  # type: ignore[no-untyped-call]
        for module in model.modules():
            zeros = module._parameters.get("weight_zero_point")
            if zeros is not None and "weight_packed" in module._parameters and zeros.dtype != torch.int32:
                scheme: Any = module.quantization_scheme
                rows = -(-zeros.shape[0] * scheme.weights.num_bits // 32)
                packed = zeros.new_empty((rows, *zeros.shape[1:]), dtype=torch.int32)
                module.weight_zero_point = nn.Parameter(packed, requires_grad=False)
