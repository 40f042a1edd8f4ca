"""Build a `Correction` from a model and its factors: identify the base, and collect the model's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from .._version import __version__
from ..errors import ConfigError
from ..factors.factors import GroupFactors
from ..quantizers.registry import is_calibrated, stored_base
from ..utils.names import split_revision
from .config import GlowQConfig
from .correction import Correction
from .factor_files import describe_groups
from .fingerprint import fingerprint
from .provenance import Provenance

__all__ = ["correction_of", "stored_config"]


def _pre_quantized(model: nn.Module) -> bool:
    """Whether the model was loaded from quantized weights rather than quantized while loading."""
    return bool(getattr(getattr(model, "hf_quantizer", None), "pre_quantized", True))


def stored_config(
    model: nn.Module,
    reference: Any,
    base_bytes: int,
    method: str,
    sequences: Tensor,
    seed: int,
    revision: str | None = None,
) -> GlowQConfig:
    """The config of a correction that config.json will store, before its groups are known.

    Args:
        model: the quantized model.
        reference: the full-precision model; its name is used as the base's name if the model itself has no name.
        base_bytes: bytes of the quantized weights.
        method: name of the solver method.
        sequences: token ids of the calibration text, shape (n, length).
        seed: seed of the calibration and the solver.
        revision: branch, tag or commit that the model was loaded from on the Hub; None for its main branch.

    Raises:
        ConfigError: neither the model nor the reference has a name from which the base can be loaded again.
    """
    base = getattr(getattr(model, "config", None), "quantization_config", None)
    name, revision = _base_identity(model, reference, revision)
    return GlowQConfig(
        base=stored_base(base.base if isinstance(base, GlowQConfig) else base),
        method=method,
        seed=seed,
        format="correction",
        base_model={"name": name, "revision": revision, "fingerprint": fingerprint(model)},
        groups={},
        base_bytes=base_bytes,
        provenance=Provenance(
            glowq=__version__,
            calibration_tokens=int(sequences.numel()),
            sequence_length=int(sequences.shape[1]),
        ),
    )


def _base_identity(model: nn.Module, reference: Any, revision: str | None) -> tuple[str, str | None]:
    """Name and revision of the base, to load it again: the quantized model's folder or Hub name, and its commit."""
    config: Any = getattr(model, "config", None)
    earlier = getattr(config, "quantization_config", None)
    if isinstance(earlier, GlowQConfig) and earlier.base_model is not None:
        # The model was loaded as a corrected model, and its correction was detached. Its folder is not a base.
        return earlier.base_model["name"], earlier.base_model["revision"]
    name = getattr(config, "_name_or_path", "")
    if not name and isinstance(reference, str):
        name, revision = split_revision(reference)
    if not name:
        raise ConfigError("the model's config does not name where it was loaded from; load it with from_pretrained.")
    if Path(name).is_file():
        name = str(Path(name).parent)  # HQQ's own loader stores the path of config.json
    if Path(name).is_dir():
        return str(Path(name).resolve()), None
    cached = try_to_load_from_cache(str(name), "config.json", revision=revision)
    return str(name), Path(cached).parent.name if isinstance(cached, str) else revision


def _model_config(model: nn.Module) -> dict[str, Any]:
    """The model's own fields of config.json, with its class, without its quantization config and its source folder."""
    config: Any = getattr(model, "config", None)
    stored = dict(config.to_dict())
    stored.pop("quantization_config", None)
    stored.pop("_name_or_path", None)
    stored["architectures"] = [type(model).__name__]
    return stored


def correction_of(
    model: nn.Module, factors: list[GroupFactors], config: GlowQConfig, base_bytes: int, tokenizer: Any
) -> Correction:
    """A correction with these factors, and with the settings of `model` that its folder needs to load as a model.

    Args:
        model: the quantized model.
        factors: factors of every restored group.
        config: what `stored_config` returned.
        base_bytes: bytes of the quantized weights.
        tokenizer: tokenizer to save with the correction, or None.
    """
    return Correction(
        factors=factors,
        config=config.with_groups(describe_groups(factors)),
        model_config=_model_config(model),
        base_bytes=base_bytes,
        tokenizer=tokenizer,
        generation_config=getattr(model, "generation_config", None),
        base_is_stored=_pre_quantized(model) or not is_calibrated(config.base),
    )
