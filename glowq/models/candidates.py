"""Find the linear modules of a model that can be corrected, from its file headers and its architecture alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import BackendError, ConfigError, UnsupportedModuleError
from ..quantizers.base import Backend, Scheme, StoredModule
from ..quantizers.registry import stored_scheme
from .headers import Headers
from .loading import load_config, model_class
from .stored_experts import divide, expert_names, joined

__all__ = ["Candidates", "find_candidates"]

_NO_EXPERTS = (
    "corrected only if torchao has quantized it, if it was dequantized on load (--base dense), or if the files hold "
    "each expert quantized by GPTQ, AWQ or compressed-tensors"
)


@dataclass
class Candidates:
    """The linear modules of a model.

    Attributes:
        schemes: every quantized module that glowq can read -> its quantization settings.
        backends: the same modules -> their backend.
        skipped: every other linear module, and those of `schemes` that no hook can correct -> the reason.
        sizes: bytes in the files: "correctable", "skipped" (quantized, but not correctable) and "not_quantized".
        note: what could not be determined, and how to determine it; None if nothing is missing.
    """

    schemes: dict[str, Scheme] = field(default_factory=dict)
    backends: dict[str, Backend] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    note: str | None = None

    @property
    def correctable(self) -> list[str]:
        """Names of the modules that can be corrected."""
        return [name for name in self.schemes if name not in self.skipped]


def find_candidates(name: str, headers: Headers, settings: Mapping[str, Any] | None, refusal: str | None) -> Candidates:
    """Find the quantization settings of every linear module of a model, or the reason why it cannot be corrected.

    The architecture is built without memory for its weights. No quantization library is needed.

    Args:
        name: folder or Hub name of the model.
        headers: headers of its files.
        settings: its quantization config; None for a model that is not quantized.
        refusal: the reason why glowq cannot correct any quantized module of the model; None if there is none.
    """
    found = Candidates()
    try:
        model = _empty_model(name)
    except (ConfigError, UnsupportedModuleError) as error:
        model, found.note = None, f"only the files were read, because the architecture cannot be built: {error}"
    rename = renaming(model) if model is not None else str
    stored = joined(headers.modules().values(), rename)
    layers = linears(model) if model is not None else {}
    experts = _experts(model) if model is not None else {}
    for name, shape in experts.items():
        divide(stored, name, shape[0])
    for name, module in stored.items():
        _classify(found, name, module, settings, refusal)
    for name, tied in layers.items():
        if name not in found.schemes and name not in found.skipped:
            found.skipped[name] = _why_not(stored.get(name), tied)
    for name, shape in experts.items():
        if any(key in found.schemes for key in expert_names(name, shape[0])):
            continue
        inside = [key for key in found.schemes if key.startswith(f"{name.rpartition('.')[0]}.")]
        if inside and all(found.backends[key].loads_experts for key in inside):
            continue
        for key in inside:
            del found.schemes[key], found.backends[key]
        found.skipped[name] = f"one parameter of shape {shape} for all experts, {_NO_EXPERTS}"
    if found.correctable and model is not None:
        _trace(model, found)
    found.sizes = _sizes(found, stored)
    return found


def _sizes(found: Candidates, stored: Mapping[str, StoredModule]) -> dict[str, int]:
    sizes, correctable = {"correctable": 0, "skipped": 0, "not_quantized": 0}, set(found.correctable)
    for name, module in stored.items():
        kind = "correctable" if name in correctable else "not_quantized" if _is_plain(module) else "skipped"
        sizes[kind] += sum(module.sizes.values())
    return sizes


def _classify(
    found: Candidates, name: str, module: StoredModule, settings: Mapping[str, Any] | None, refusal: str | None
) -> None:
    if settings is None:
        return
    try:
        known = stored_scheme(settings, module)
    except BackendError as error:
        found.skipped[name] = str(error)
        return
    if known is not None and refusal is None:
        found.backends[name], found.schemes[name] = known
    elif known is not None or (refusal is not None and not _is_plain(module)):
        found.skipped[name] = refusal or ""


def _is_plain(module: StoredModule) -> bool:
    """Whether a module holds only floats of at least 16 bits, as norms and embeddings do too."""
    return all(dtype in ("F64", "F32", "F16", "BF16") for dtype in module.dtypes.values())


def _why_not(module: StoredModule | None, tied: bool) -> str:
    if module is None or not module.dtypes:
        return "not quantized (it shares the embeddings' weight)" if tied else "the files hold no tensor of it"
    if _is_plain(module):
        return "not quantized"
    return f"quantized in a layout that glowq does not know (tensors {', '.join(sorted(module.dtypes))})"


def _empty_model(name: str) -> Any:
    """Build the model on the meta device, without its quantizer.

    Raises:
        ConfigError: transformers does not support the model type.
        UnsupportedModuleError: transformers cannot build it from its config alone.
    """
    import torch

    from ..utils.logging import quiet

    config = load_config(name)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    chosen = model_class(config)
    build = getattr(chosen, "_from_config", None) or chosen.from_config
    try:
        with torch.device("meta"), quiet("transformers"):
            return build(config)
    except Exception as error:
        raise UnsupportedModuleError(f"{type(error).__name__}: {error}") from error


def renaming(model: Any) -> Callable[[str], str]:
    """Return a function from module names in the files to names in the model, as transformers renames on loading.

    Args:
        model: a model before its layers are replaced by quantized ones.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    known = dict(model.named_parameters(remove_duplicate=False))

    def rename(name: str) -> str:
        key: str = rename_source_key(f"{name}.weight", renamings, [], model.base_model_prefix, known)[0]
        return key.removesuffix(".weight")

    return rename


def linears(model: Any) -> dict[str, bool]:
    """Every linear layer -> whether it shares its weight with the embeddings."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {
        name: f"{name}.weight" in tied
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def _experts(model: Any) -> dict[str, tuple[int, ...]]:
    """Every parameter that holds one matrix per expert -> its shape."""
    from torch import nn

    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3
        and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Conv1d | nn.ConvTranspose1d)
        and "expert" in name
    }


def _trace(model: Any, found: Candidates) -> None:
    """Skip the modules that a forward does not call; the forward runs on shapes alone."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ..quantizers.experts import every_token_everywhere
    from ..quantizers.loading.dense import mark_dense
    from .forward import example_inputs
    from .tracing import trace_groups

    mark_dense(model)
    try:
        # Some architectures read the values of their inputs unless these are fake tensors. A plain meta tensor has no
        # values, so that this would fail.
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, every_token_everywhere():
            inputs = {name: mode.from_tensor(value) for name, value in example_inputs(model).items()}
            skipped = trace_groups(model, inputs).skipped
    except Exception as error:  # the code of any architecture runs here, without values
        found.note = (
            "whether a forward calls every module could not be found out without weights "
            f"({type(error).__name__}); `glowq groups` finds it out by running the model."
        )
        return
    found.skipped.update({name: reason for name, reason in skipped.items() if name in found.schemes})
