"""`Backend` and `Scheme`: the interface between glowq and a library's quantized linear modules."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["DENSE_MARK", "Backend", "FusedProduct", "Scheme", "StoredModule", "Unavailable", "changed"]

DENSE_MARK = "glowq_corrects_dense_weight"
"""Attribute of the modules whose plain float weight is to be corrected, see `glowq.quantizers.loading.dense`."""

_MODEL_CODE = ("transformers.models.", "transformers_modules.")  # the second is custom code from the Hub

FusedProduct = Callable[[Any, "Tensor"], "Callable[..., Tensor] | None"]
"""See `Backend.fused_product`."""


@dataclass(frozen=True)
class Scheme:
    """The settings that a module's weight was quantized with. Equal settings compare equal and print the same text.

    Attributes:
        format: name of the stored values' format ("nf4", "int4", "gptq int4").
        bits: bits per value, without the scales.
        group_size: number of values in a row that share a scale; None if one scale serves a whole row, 0 if the format
            has no scales.
        details: other settings that distinguish two schemes ("asymmetric", "act-order").
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
    """One module as the headers of a checkpoint describe it; no tensor values are read.

    Attributes:
        name: full module name.
        dtypes: tensor name under the module ("qweight", "weight.absmax") -> dtype as safetensors writes it ("I32").
        shapes: the same names -> shape.
        metadata: name under the module -> text that the library wrote about it into the header.
        sizes: the names of `shapes` -> bytes.
    """

    name: str
    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Unavailable:
    """Why a library has no such setting, as the end of a sentence."""

    reason: str


def changed(config: Any, **settings: Any) -> Any:
    """A copy of a transformers quantization config with other settings."""
    found = copy.copy(config)
    for name, value in settings.items():
        setattr(found, name, value)
    return found


class Backend(ABC):
    """One kind of quantized module of one library.

    Attributes:
        name: name that `glowq inspect` shows.
        package: import name of the library that defines the module.
        extra: the pip extra of glowq that installs the library.
        tested: versions of the library that glowq is tested with, as a version specifier. Other versions cause one
            warning.
        methods: values of `quant_method` in config.json; models with these values contain such modules.
        presets: `--base` name -> factory of the transformers quantization config that produces such modules.
        saves: source of the quantized tensors when a self-contained model is saved: "state" for the model's own state
            (saving is exact); "files" for the checkpoint that was loaded (the library rewrites the tensors in memory);
            "never" if the library cannot load what it would save.
        zero_scales: whether the library itself writes scales of zero (for blocks of zeros).
        loads_experts: whether glowq loads experts that the library has quantized one by one, see `loading_experts`.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    extra: ClassVar[str]
    tested: ClassVar[str]
    methods: ClassVar[tuple[str, ...]] = ()
    presets: ClassVar[Mapping[str, Callable[[], Any]]] = MappingProxyType({})
    saves: ClassVar[Literal["state", "files", "never"]] = "state"
    zero_scales: ClassVar[bool] = False
    loads_experts: ClassVar[bool] = False

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether `module` belongs to this backend. Must not import the library."""

    @abstractmethod
    def weight(self, module: Any) -> Tensor:
        """The weight that the module's kernel multiplies by, shape (out_features, in_features), any float dtype.

        Raises:
            BackendError: the weight cannot be read exactly.
        """

    @abstractmethod
    def codes(self, module: Any) -> Sequence[Tensor]:
        """The stored integers (codes, zero points, column order), any shapes. Fingerprints cover a sample of them.

        A backend must always return the same tensors, or fingerprints of older corrections no longer match.
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
        """The settings that `scheme` returns for the loaded module, read from its checkpoint alone.

        Must not import the library.

        Args:
            module: the module's tensors, without their values.
            config: the quantization config of config.json.

        Returns:
            The settings, or None if the tensors do not belong to this kind of module.

        Raises:
            BackendError: the tensors belong to this kind of module, but glowq cannot read their layout or format; the
                message says what to do.
        """
        return None

    def rounds_inputs(self, module: Any) -> bool:
        """Whether the module's kernel also quantizes its inputs. Its output is then not W x, but W times rounded x."""
        return any(detail.startswith("inputs rounded") for detail in self.scheme(module).details)

    def may_differ(self, module: Any) -> bool:
        """Whether the module may compute something else than W x + b, so that its values are to be compared with it.

        It may where code of the model computes its forward, and not code of torch or of the library.
        """
        owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
        return owner.__module__.startswith(_MODEL_CODE)

    def holds_experts(self, stack: Tensor) -> bool:
        """Whether a parameter with the matrices of all experts of a layer is quantized by this library.

        Args:
            stack: shape (experts, out_features, in_features), or with the last two swapped.
        """
        return False

    def packed_bytes(self, module: Any) -> int:
        """Bytes of the weight at its nominal bit width plus its scales, independent of the library's storage format."""
        out_features, in_features = self.features(module)
        scales = sum(scale.numel() * scale.element_size() for scale in self.scales(module))
        return int(out_features * in_features * self.scheme(module).bits) // 8 + scales

    def prepare(self, module: Any, dtype: torch.dtype) -> None:  # noqa: B027 - most libraries need no preparation
        """Make the module safe to read, run and save. Called once after loading.

        Args:
            module: a module of this backend.
            dtype: dtype of the inputs that the module will get in the model.

        Raises:
            BackendError: the module is damaged or cannot be read.
        """

    def release(self, module: Any) -> bool:
        """Allow the library's fastest kernel, if `prepare` disabled it.

        From the next forward on, the module can only be run, not read or saved: the kernel rewrites the weight.

        Returns:
            Whether such a kernel was allowed.
        """
        return False

    def fused_product(self, module: Any) -> FusedProduct | None:
        """A Triton kernel that computes the module's product and adds a correction in the same launch.

        Returns:
            None if no kernel can read the module's weight. Otherwise a callable that takes the module and its input x,
            shape (..., d), float16, bfloat16 or float32. It is called only if no gradient is needed. The callable
            returns None if the module must compute this input by itself. Otherwise it returns a function of
            `glowq_kernels` with all arguments filled in except `product`, shape (..., r), `left`, shape (o, r),
            `left_scale`, shape (o,) or None, and `left_multipliers`, None unless `left` is in blocks. The result of
            that function, converted to the dtype of x, is the output of the module's own forward plus the correction.

            The callable is stored, copied and pickled with the model. It therefore reads the module's tensors at every
            call, and keeps values that it computes from them in a `Derived`.
        """
        return None

    def features(self, module: Any) -> tuple[int, int]:
        """(out_features, in_features)."""
        return int(module.out_features), int(module.in_features)

    def calibrated(self, config: Any) -> bool:
        """Whether quantizing with `config` needs calibration text, and `config` does not name any."""
        return False

    def with_calibration(self, config: Any, sequences: Tensor) -> Any:
        """Add calibration text to a config.

        Args:
            config: a transformers quantization config of this backend.
            sequences: token ids, shape (n, length), int64.

        Returns:
            A copy of `config` that calibrates on `sequences`; `config` itself if `calibrated` is false for it.
        """
        return config

    def stored_config(self, config: Any) -> Any:
        """The form of `config` that config.json stores: it fits the saved tensors and holds no calibration text."""
        return config

    def rename_stored(self, quantizer: Any, rename: Callable[[str], str]) -> None:  # noqa: B027 - most need nothing
        """Rename what a transformers quantizer has noted about stored tensors, if it has noted anything.

        Args:
            quantizer: transformers' quantizer of a pre-quantized model of another class than the stored one, after it
                has seen the files and before the weights are loaded.
            rename: module name in the files -> name in the model.
        """

    def finer(self, config: Any) -> Any | Unavailable:
        """A copy of `config` whose groups have half the size, so that there are twice as many scales."""
        return Unavailable(f"{self.package} has no setting for smaller groups")

    def wider(self, config: Any) -> Any | Unavailable:
        """A copy of `config` with the next larger bit width for all modules."""
        return Unavailable(f"{self.package} has no larger bit width")

    def partner(self, config: Any) -> Any | Unavailable | None:
        """The config that `mixed` gives to some modules; None if it leaves them in full precision."""
        return Unavailable(f"{self.package} has one bit width for all modules")

    def partner_bits(self, bits: float) -> float | None:
        """Bits per value that `partner` gives to a module that has `bits`; None if it leaves it in full precision."""
        return None

    def mixed(self, config: Any, wide: Sequence[str], others: Sequence[str], dense: Sequence[str]) -> Any:
        """A copy of `config` in which some modules have the settings of `partner`.

        It is called only if `partner` does not return `Unavailable`.

        Args:
            config: a transformers quantization config of this backend.
            wide: names of these modules, without the model's prefix ("layers.0.mlp.up_proj"), at least one.
            others: names of the modules that keep the settings of `config`.
            dense: names of the linear modules that `config` does not quantize.
        """
        raise NotImplementedError

    def quantizers(self) -> Mapping[str, type]:
        """`quant_method` -> transformers quantizer that glowq registers when it is imported.

        Needed only for methods that transformers does not have, or whose models it loads wrongly or not at all.
        """
        return {}
