"""GPTQ: gptqmodel's packed linear modules. Checkpoints of optimum and AutoGPTQ are loaded into the same modules."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import BackendError, RepackedWeightError
from ..base import Backend, FusedProduct, Scheme, StoredModule, Unavailable, changed
from ..registry import register
from ._gptqmodel import keep_readable, let_rewrite

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

GROUP_SIZE = 128
_LEAST_GROUP = 16
_NEXT_BITS = {2: 3, 3: 4, 4: 8}

# Modules whose forward is only a product with the weight that `weight` returns.
_PLAIN = ("TorchLinear", "TritonV2Linear", "TorchFusedLinear", "TorchAtenLinear")


def _config(bits: int) -> Any:
    from transformers import GPTQConfig

    # With 2 bits, a symmetric mapping would leave one of the four levels unused.
    return GPTQConfig(bits=bits, group_size=GROUP_SIZE, sym=bits > 2, backend="torch")


@register
class GPTQ(Backend):
    """`gptqmodel` modules that keep GPTQ's layout: 2, 3, 4 and 8 bits, symmetric or not, with or without act-order."""

    name = "gptq"
    package = "gptqmodel"
    extra = "gptq"
    tested = ">=7.6,<7.7"
    methods = ("gptq",)
    presets: ClassVar = {f"gptq-{bits}": partial(_config, bits) for bits in (2, 3, 4, 8)}
    # gptqmodel converts the zero points of AutoGPTQ's format in memory. If the converted ones were saved, the next load
    # would convert them again.
    saves = "files"
    loads_experts = True

    def matches(self, module: nn.Module) -> bool:
        library = sys.modules.get("gptqmodel.nn_modules.qlinear")
        # A quantized embedding is also a PackableQuantLinear, but it looks up rows of its weight and never multiplies.
        return library is not None and isinstance(module, library.GPTQQuantLinear) and not _is_embedding(module)

    def prepare(self, module: Any, dtype: torch.dtype) -> None:
        keep_readable(module)
        order, groups = module.g_idx, module.scales.shape[0]
        if int(order.min()) < 0 or int(order.max()) >= groups:
            raise BackendError(
                f"g_idx names groups {int(order.min())} to {int(order.max())}, but there are {groups}: the checkpoint "
                "is damaged. Download or quantize the model again."
            )

    def release(self, module: Any) -> bool:
        return let_rewrite(module)

    def fused_product(self, module: Any) -> FusedProduct | None:
        import torch

        from ..products.gptq import Product

        plain = type(module).forward.__qualname__ in [f"{name}.forward" for name in _PLAIN]
        return Product() if plain and module.bits == 4 and module.pack_dtype is torch.int32 else None

    def weight(self, module: Any) -> Tensor:
        self._check(module)
        return type(module).dequantize_weight(module).T  # of the class: the instance's attribute is a compiled version

    def codes(self, module: Any) -> list[Tensor]:
        self._check(module)
        return [module.qweight, module.qzeros, module.g_idx]

    def scales(self, module: Any) -> list[Tensor]:
        self._check(module)
        return [module.scales]

    def scheme(self, module: Any) -> Scheme:
        from ..products.gptq import consecutive

        self._check(module)
        # Computed from the tensors: optimum passes the module's flags in another order than gptqmodel expects.
        rows, groups = module.g_idx.numel(), module.scales.shape[0]
        size = consecutive(module.g_idx.long(), groups)
        details = ["symmetric" if _is_symmetric(module) else "asymmetric"]
        if size is None:
            size = -(-rows // groups)
            details.append("act-order")
        return Scheme(f"gptq int{module.bits}", module.bits, None if groups == 1 else size, tuple(details))

    def stored_scheme(self, module: StoredModule, config: Mapping[str, Any]) -> Scheme | None:
        if not {"qweight", "scales"} <= module.shapes.keys():
            return None
        rows, groups = module.shapes["qweight"][0], module.shapes["scales"][0]
        inputs = module.shapes["g_idx"][0] if "g_idx" in module.shapes else 32 * rows // config["bits"]
        bits = 32 * rows // inputs
        if module.dtypes["qweight"] != "I32" or "qzeros" not in module.shapes or 32 * rows != bits * inputs:
            raise BackendError("its tensors do not have the shapes of GPTQ's layout, the only one that glowq reads")
        details = ["symmetric" if config.get("sym", True) else "asymmetric"]
        if config.get("desc_act", False) and groups > 1:
            details.append("act-order")
        size = config.get("group_size")
        if not isinstance(size, int) or size < 1 or -(-inputs // size) != groups:
            size = -(-inputs // groups)
        return Scheme(f"gptq int{bits}", bits, None if groups == 1 else size, tuple(details))

    def packed_bytes(self, module: Any) -> int:
        zeros = 0 if _is_symmetric(module) else module.scales.numel() * module.bits // 8
        return super().packed_bytes(module) + zeros

    def finer(self, config: Any) -> Any | Unavailable:
        if config.group_size < 2 * _LEAST_GROUP:
            return Unavailable(
                f"gptqmodel reads no smaller groups than {_LEAST_GROUP}, or there is a scale for each row"
            )
        return changed(config, group_size=config.group_size // 2)

    def wider(self, config: Any) -> Any | Unavailable:
        if config.bits == 8:
            return Unavailable("8 bits are the most that GPTQ packs")
        return changed(config, bits=_NEXT_BITS[config.bits], sym=config.sym or config.bits == 2)

    def partner(self, config: Any) -> Unavailable:
        return Unavailable(
            "transformers and optimum read one bit width for all modules of a GPTQ checkpoint; gptqmodel's own "
            "`dynamic` settings are not among theirs"
        )

    def calibrated(self, config: Any) -> bool:
        return getattr(config, "dataset", None) is None

    def with_calibration(self, config: Any, sequences: Tensor) -> Any:
        import torch

        if not self.calibrated(config):
            return config
        config = copy.copy(config)
        config.dataset = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in sequences]
        return config

    def stored_config(self, config: Any) -> Any:
        config = copy.copy(config)
        config.dataset = config.tokenizer = None
        return config

    def quantizers(self) -> dict[str, type]:
        from transformers.quantizers.quantizer_gptq import GptqHfQuantizer

        from ..loading.divided_experts import loading_experts

        return {"gptq": loading_experts(GptqHfQuantizer)}

    @staticmethod
    def _check(module: Any) -> None:
        library = sys.modules["gptqmodel.nn_modules.qlinear"]
        if not isinstance(module, library.PackableQuantLinear):
            raise BackendError(
                f"gptqmodel's {type(module).__name__} keeps its weight in the order of its own kernel, which cannot be "
                "read back exactly. Load the model with GPTQConfig(bits=..., backend='torch')."
            )
        if getattr(module, "linear_mode", None) == "inference" or module.qweight.dtype != module.pack_dtype:
            raise RepackedWeightError(
                f"gptqmodel's {type(module).__name__} rewrote its weight at an earlier forward; it can no longer be "
                "read back exactly. Load the model again and call glowq before its first forward, or load it with "
                "GPTQConfig(bits=..., backend='torch')."
            )


def _is_embedding(module: nn.Module) -> bool:
    torch_kernel = sys.modules.get("gptqmodel.nn_modules.qlinear.torch")
    return torch_kernel is not None and isinstance(module, torch_kernel.TorchQuantEmbeddings)


def _is_symmetric(module: Any) -> bool:
    """Whether every zero point is the middle code. The packed words then repeat a fixed pattern of this one value."""
    import torch

    bits = module.bits
    count = 32 // bits if bits != 3 else 32
    stream = sum((1 << (bits - 1)) << (bits * index) for index in range(count))
    words = [(stream >> (32 * index)) & 0xFFFFFFFF for index in range(count * bits // 32)]
    period = torch.tensor([word - (1 << 32) if word >= 1 << 31 else word for word in words], dtype=torch.int32)
    zeros = module.qzeros.to("cpu", torch.int32)
    return bool((zeros.reshape(-1, len(words)) == period).all())
