"""`Backend` and `Scheme`: what glowq has to know about a library's quantized linear module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

__all__ = ["Backend", "FusedProduct", "Scheme", "StoredModule"]

FusedProduct = Callable[[Any, Tensor], Callable[..., Tensor] | None]
"""See `Backend.fused_product`."""


@dataclass(frozen=True)
class Scheme:
    """The settings that a module's weight was quantized with; equal settings compare and print equal.

    Attributes:
        format: the name that the library gives the values ("nf4", "int4", "gptq").
        bits: bits a value, scales not counted.
        group_size: values of one row that share a scale; None where one scale serves a whole row, 0 where none does.
        details: whatever else tells two settings apart ("asymmetric", "act-order").
    """

    format: str
    bits: float
    group_size: int | None
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        grouping = ["one scale a row"] if self.group_size is None else [f"groups of {self.group_size}"]
        return ", ".join([self.format, *(grouping if self.group_size != 0 else []), *self.details])


@dataclass(frozen=True)
class StoredModule:
    """What the headers of a checkpoint say of one module, its values unread.

    Attributes:
        name: full module name.
        dtypes: tensor name under the module ("qweight", "weight.absmax") -> dtype as safetensors writes it ("I32").
        shapes: the same names -> shape.
        metadata: the same kind of names -> what the library wrote about them into the header.
    """

    name: str
    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str] = field(default_factory=dict)


class Backend(ABC):
    """One base quantizer's module kind.

    Attributes:
        name: how `glowq inspect` calls it.
        package: the import name of the library that owns the module.
        extra: the pip extra of glowq that installs the library.
        tested: the versions of the library that glowq is tested with, as a version specifier; others warn once.
        methods: the `quant_method` names of config.json whose models hold such modules.
        presets: `--base` names -> factory of the transformers quantization config that produces such modules.
        saves: where a self-contained model takes the quantized tensors from: "state", the model's own state (saving
            is exact); "files", the checkpoint that was loaded (the library rewrites them in memory); "never" (the
            library cannot load what it would save).
        zero_scales: whether the library itself writes scales of zero (for blocks of zeros).
    """

    name: ClassVar[str]
    package: ClassVar[str]
    extra: ClassVar[str]
    tested: ClassVar[str]
    methods: ClassVar[tuple[str, ...]] = ()
    presets: ClassVar[Mapping[str, Callable[[], Any]]] = MappingProxyType({})
    saves: ClassVar[Literal["state", "files", "never"]] = "state"
    zero_scales: ClassVar[bool] = False

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is this backend's; must not import the library."""

    @abstractmethod
    def weight(self, module: Any) -> Tensor:
        """The weight that the module's kernel multiplies by, shape (out_features, in_features), any float dtype.

        Raises:
            BackendError: the weight cannot be read exactly.
        """

    @abstractmethod
    def codes(self, module: Any) -> Sequence[Tensor]:
        """The stored integers, any shapes: codes, zero points, column order. A fingerprint covers a sample of them.

        Which tensors these are must never change: fingerprints of older corrections could no longer be compared.
        """

    @abstractmethod
    def scales(self, module: Any) -> Sequence[Tensor]:
        """The stored scales, any shapes, float."""

    def offsets(self, module: Any) -> Sequence[Tensor]:
        """Zero points and other offsets that are neither in `codes` nor in `scales`, any shapes and dtypes."""
        return []

    @abstractmethod
    def scheme(self, module: Any) -> Scheme:
        """The quantization settings."""

    def stored_scheme(self, module: StoredModule, config: Mapping[str, Any]) -> Scheme | None:
        """What `scheme` says of a module once it is loaded, told by its checkpoint alone; must not import the library.

        Args:
            config: the quantization config of config.json.

        Returns:
            None where the tensors are not those of such a module.

        Raises:
            BackendError: they are, in a layout or format that cannot be read; the message says what to do.
        """
        return None

    def rounds_inputs(self, module: Any) -> bool:
        """Whether the module's kernel quantizes its inputs as well, so that it computes no product with its weight."""
        return any(detail.startswith("inputs rounded") for detail in self.scheme(module).details)

    def packed_bytes(self, module: Any) -> int:
        """Bytes of the weight at its nominal bit width plus its scales, however the library stores it."""
        out_features, in_features = self.features(module)
        scales = sum(scale.numel() * scale.element_size() for scale in self.scales(module))
        return int(out_features * in_features * self.scheme(module).bits) // 8 + scales

    def prepare(self, module: Any, dtype: torch.dtype) -> None:  # noqa: B027 - most libraries set no trap
        """Close the library's traps before the module is read, run or saved; called once after loading.

        Args:
            dtype: of the activations that the model will feed.
        """

    def release(self, module: Any) -> bool:
        """Undo what in `prepare` keeps the library's fastest kernel away; returns whether there was anything to undo.

        From its next forward on the module may be run only: the kernel rewrites the weight.
        """
        return False

    def fused_product(self, module: Any) -> FusedProduct | None:
        """The module's product in a Triton kernel that adds a correction in the same launch.

        Returns:
            None where no kernel reads such a module's weight. Else an object that is called with the module and its
            input x, shape (..., d), float16, bfloat16 or float32, where no gradient is wanted. It returns None where
            the module has to compute this by itself; else a function of `glowq_kernels` with all of its arguments but
            `product`, shape (..., r), `left`, shape (o, r), and `left_scale`, shape (o,) or None. What that returns,
            converted to the dtype of x, is what the module's own forward would, with the correction in it.

            The object is kept, copied and pickled with the model: it looks the module's tensors up at every call, and
            keeps what it computes of them in a `Derived`.
        """
        return None

    def features(self, module: Any) -> tuple[int, int]:
        """(out_features, in_features)."""
        return int(module.out_features), int(module.in_features)

    def calibrated(self, config: Any) -> bool:
        """Whether the library needs text to quantize as `config` says, and `config` names none."""
        return False

    def with_calibration(self, config: Any, sequences: Tensor) -> Any:
        """A copy of a `calibrated` config that quantizes with `sequences`, token ids (n, length); else `config`."""
        return config

    def stored_config(self, config: Any) -> Any:
        """What config.json stores of a `config`: as the saved tensors need it, without text that it quantized with."""
        return config

    def quantizers(self) -> Mapping[str, type]:
        """The transformers quantizers, by `quant_method`, that glowq registers when it is imported.

        Only for methods that transformers does not know, or whose models it loads wrongly or not at all.
        """
        return {}
