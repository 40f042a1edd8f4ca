"""Build a `Correction` from a model and its factors: identify the base, and collect the model's settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import nn

from .._version import __version__
from ..data.inputs import Samples
from ..errors import ConfigError
from ..factors.factors import GroupFactors
from ..models.model_config import read_model_config
from ..quantizers.registry import is_calibrated, method_of, stored_base
from ..utils.names import split_revision
from .config import GlowQConfig
from .correction import Correction
from .custom_code import code_of
from .factor_tensors import describe_groups
from .fingerprint import backbone_fingerprint, fingerprint
from .provenance import Provenance
from .stored_fields import BASE_PLACE

__all__ = ["correction_of", "stored_config"]


def _pre_quantized(model: nn.Module) -> bool:
    """Whether the model was loaded from quantized weights rather than quantized while loading."""
    return bool(getattr(getattr(model, "hf_quantizer", None), "pre_quantized", True))


def stored_config(
    model: nn.Module,
    reference: Any,
    base_bytes: int,
    method: str,
    sequences: Samples,
    seed: int,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
) -> GlowQConfig:
    """The config of a correction that config.json will store, before its groups are known.

    Args:
        model: the quantized model.
        reference: the full-precision model; its name is used as the base's name if the model itself has no name.
        base_bytes: bytes of the quantized weights.
        method: name of the solver method.
        sequences: token ids of the calibration text, shape (n, length), or samples of another kind.
        seed: seed of the calibration and the solver.
        revision: branch, tag or commit that the model was loaded from on the Hub; None for its main branch.
        subfolder, variant: what `from_pretrained` was told of them when it loaded the model, or None.

    Raises:
        ConfigError: neither the model nor the reference has a name from which the base can be loaded again; or the
            folder of that name holds no model.
    """
    base = getattr(getattr(model, "config", None), "quantization_config", None)
    place = {"revision": revision, "subfolder": subfolder, "variant": variant}
    identity = _base_identity(model, reference, {key: value for key, value in place.items() if value})
    return GlowQConfig(
        base=stored_base(base.base if isinstance(base, GlowQConfig) else base),
        method=method,
        seed=seed,
        format="correction",
        base_model={
            **identity,
            "fingerprint": fingerprint(model),
            "backbone": backbone_fingerprint(model),
        },
        groups={},
        base_bytes=base_bytes,
        provenance=Provenance(
            glowq=__version__,
            calibration_tokens=int(sequences.numel()),
            sequence_length=int(sequences.shape[1]),
        ),
    )


def _base_identity(model: nn.Module, reference: Any, place: Mapping[str, str]) -> dict[str, str | None]:
    """What to load the base by: the quantized model's folder or Hub name, its commit, its subfolder and its variant."""
    config: Any = getattr(model, "config", None)
    earlier = getattr(config, "quantization_config", None)
    if isinstance(earlier, GlowQConfig) and earlier.base_model is not None:
        # The model was loaded as a corrected model, and its correction was detached. Its folder is not a base.
        return {key: earlier.base_model[key] for key in BASE_PLACE if key in earlier.base_model}
    name, revision = getattr(config, "_name_or_path", ""), place.get("revision")
    if not name and isinstance(reference, str):
        name, revision = split_revision(reference)
    if not name:
        raise ConfigError("the model's config does not name where it was loaded from; load it with from_pretrained.")
    if Path(name).is_file():
        name = str(Path(name).parent)  # HQQ's own loader stores the path of config.json
    if Path(name).is_dir():
        _check_place(Path(name), place)
        return {**place, "name": str(Path(name).resolve()), "revision": None}
    cached = try_to_load_from_cache(str(name), _config_file(place), revision=revision)
    parents = len(Path(_config_file(place)).parents)  # the folder of a snapshot is named after its commit
    commit = Path(cached).parents[parents - 1].name if isinstance(cached, str) else revision
    return {**place, "name": str(name), "revision": commit}


def _config_file(place: Mapping[str, Any]) -> str:
    return "/".join(filter(None, [place.get("subfolder"), "config.json"]))


def _check_place(folder: Path, place: Mapping[str, str]) -> None:
    """Refuse a local base that could not be found again by its name."""
    if not (folder / _config_file(place)).is_file() and not any(folder.glob("*.gguf")):
        raise ConfigError(
            f"the model was loaded from {folder}, and {folder / _config_file(place)} does not exist. If "
            "from_pretrained was given a subfolder, give the same one to glowq.correct: subfolder=..."
        )


def _model_config(model: nn.Module) -> dict[str, Any]:
    """The model's own fields of config.json, with its class, without its quantization config and its source folder."""
    config: Any = getattr(model, "config", None)
    stored = dict(config.to_dict())
    stored.pop("quantization_config", None)
    stored.pop("_name_or_path", None)
    stored["architectures"] = [type(model).__name__]
    return stored


def _unstored(model: nn.Module, config: GlowQConfig, lacking: Sequence[str]) -> str | None:
    """Why the base's name does not lead to this model, as the beginning of a sentence; None if it does."""
    if not _pre_quantized(model) and is_calibrated(config.base):
        return f"the base was quantized in memory with calibration text ({method_of(config.base)})"
    if lacking:
        return f"the base's checkpoint lacks {lacking[0]!r}, which is new in this model"
    stored, rows = _stored_vocabulary(config), getattr(getattr(model, "config", None), "vocab_size", None)
    if stored is not None and rows is not None and stored != rows:
        return f"the embeddings were resized to {rows} tokens (the base has {stored})"
    return None


def _stored_vocabulary(config: GlowQConfig) -> int | None:
    """`vocab_size` in the base's config.json; None if that is not on this machine or does not say."""
    base = config.base_model or {}
    if Path(base["name"]).is_dir():
        file: Any = str(Path(base["name"]) / _config_file(base))
    else:
        file = try_to_load_from_cache(base["name"], _config_file(base), revision=base["revision"])
    # The cache answers with an object if it knows that there is no such file.
    return read_model_config(Path(file)).get("vocab_size") if isinstance(file, str) and Path(file).is_file() else None


def correction_of(
    model: nn.Module,
    factors: list[GroupFactors],
    config: GlowQConfig,
    base_bytes: int,
    tokenizer: Any,
    lacking: Sequence[str] = (),
) -> Correction:
    """A correction with these factors, and with the settings of `model` that its folder needs to load as a model.

    Args:
        model: the quantized model.
        factors: factors of every restored group.
        config: what `stored_config` returned.
        base_bytes: bytes of the quantized weights.
        tokenizer: tokenizer to save with the correction, or None.
        lacking: names of the model's weights that the base's checkpoint lacks.
    """
    return Correction(
        factors=factors,
        config=config.with_groups(describe_groups(factors)),
        model_config=_model_config(model),
        base_bytes=base_bytes,
        tokenizer=tokenizer,
        generation_config=getattr(model, "generation_config", None),
        unstored=_unstored(model, config, lacking),
        code=code_of(model),
    )
