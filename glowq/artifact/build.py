"""A correction built from a model and its factors: where its base comes from, and what its folder needs of it."""

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
    """What config.json will say of a correction, before its groups are known.

    Args:
        model: the quantized model.
        reference: the full-precision model; its name stands for the base's where the model knows none.
        base_bytes: bytes of the quantized weights.
        method: name of the solver method.
        sequences: the calibration text's token ids, shape (n, length).
        seed: of the calibration and the solver.
        revision: branch, tag or commit that the model was loaded at from the Hub; None for its main branch.

    Raises:
        ConfigError: neither the model nor the reference says where the base can be loaded from again.
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
    """Where the base can be loaded from again: the quantized model's own folder or Hub name, and the cached commit."""
    config: Any = getattr(model, "config", None)
    earlier = getattr(config, "quantization_config", None)
    if isinstance(earlier, GlowQConfig) and earlier.base_model is not None:
        # Loaded with a correction that was detached: its folder is no base.
        return earlier.base_model["name"], earlier.base_model["revision"]
    name = getattr(config, "_name_or_path", "")
    if not name and isinstance(reference, str):
        name, revision = split_revision(reference)
    if not name:
        raise ConfigError("the model does not know where it was loaded from; load it with from_pretrained.")
    if Path(name).is_file():
        name = str(Path(name).parent)  # HQQ's own loader names the config.json
    if Path(name).is_dir():
        return str(Path(name).resolve()), None
    cached = try_to_load_from_cache(str(name), "config.json", revision=revision)
    return str(name), Path(cached).parent.name if isinstance(cached, str) else revision


def _model_config(model: nn.Module) -> dict[str, Any]:
    """The model's own fields of config.json: its class, and neither its quantization nor the folder it came from."""
    config: Any = getattr(model, "config", None)
    stored = dict(config.to_dict())
    stored.pop("quantization_config", None)
    stored.pop("_name_or_path", None)
    stored["architectures"] = [type(model).__name__]
    return stored


def correction_of(
    model: nn.Module, factors: list[GroupFactors], config: GlowQConfig, base_bytes: int, tokenizer: Any
) -> Correction:
    """The correction of `model` with these factors, with what its folder needs of the model to load as one.

    Args:
        config: what `stored_config` returned.
        base_bytes: bytes of the quantized weights.
        tokenizer: saved with the correction; or None.
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
