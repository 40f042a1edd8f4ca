"""`GlowQConfig`: what a user asks for, and what config.json stores."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import ConfigError, UnknownBaseError, UnsafePathError, VersionError
from ..utils.checks import check_int

__all__ = ["FORMAT_VERSION", "GlowQConfig"]

FORMAT_VERSION = 1
FORMATS = ("correction", "full")
_GROUP_FIELDS = {"members", "in_features", "out_features", "block", "rank", "gains", "total"}


class GlowQConfig(QuantizationConfigMixin):
    """Quantization config of a corrected model: pass it to `from_pretrained` to correct while loading.

    Args:
        base: the base quantizer: a transformers quantization config, its dict, or a `--base` name such as "nf4".
        rank: rank of every group; ranks larger than a group allows are lowered to what it allows.
        budget: instead of `rank`: bytes that the factors may take, as a share of the quantized weights ("1%") or a
            size ("200MB"); or the share of the predicted loss that they are to recover, with as few bytes as that
            takes ("recover 80%"). Where `correction` is given, what it is cut to.
        rank_step: a budget buys ranks in multiples of this (kernels like 8 or 16), or all that a group's shape allows.
        max_rank: most ranks that a budget buys any group.
        method: name of the solver method, see `glowq.solving.methods.base`.
        calibration: text to calibrate on: list of str, a file or folder, or a datasets name.
        calibration_tokens: how many tokens of it are used.
        sequence_length: tokens a calibration sequence, at most what the model allows.
        distill: steps of gradient descent on the chosen factors, see `glowq.correct`.
        factor_dtype: "auto", the model's own, or "int8", see `glowq.correct`.
        correction: instead of `calibration`: folder or Hub name of a saved correction to attach after quantizing.
        seed: of the choice of calibration sequences and of the solver.
        version, format, base_model, groups, base_bytes, provenance: written by glowq; not for users.

    Raises:
        ConfigError: a field is unknown or holds a value that cannot be used.
        UnknownBaseError: no such base quantizer, or its library is not installed.
        VersionError: written by a newer format.
    """

    def __init__(
        self,
        base: Any = None,
        *,
        rank: int | None = None,
        budget: str | int | None = None,
        rank_step: int = 1,
        max_rank: int | None = None,
        method: str = "glowq",
        calibration: Any = None,
        calibration_tokens: int = 32768,
        sequence_length: int = 512,
        correction: str | None = None,
        distill: int = 0,
        factor_dtype: str = "auto",
        seed: int = 0,
        version: int = FORMAT_VERSION,
        format: str = "full",
        base_model: Mapping[str, Any] | None = None,
        groups: Mapping[str, Any] | None = None,
        base_bytes: int | None = None,
        provenance: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise VersionError(
                f"this correction has format version {version}; the installed glowq reads up to {FORMAT_VERSION}. "
                "Upgrade: pip install -U glowq"
            )
        if unknown:
            raise ConfigError(_unknown_field(sorted(unknown)[0]))
        self.quant_method: Any = "glowq"  # transformers types it as one of its own methods
        self.base = _base(base)
        self.rank = 32 if rank is None and budget is None else rank
        self.budget = budget
        self.rank_step = rank_step
        self.max_rank = max_rank
        self.method = method
        self.calibration = calibration
        self.calibration_tokens = calibration_tokens
        self.sequence_length = sequence_length
        self.correction = correction
        self.distill = distill
        self.factor_dtype = factor_dtype
        self.seed = seed
        self.version = version
        self.format = format
        self.base_model = _object("base_model", base_model)
        self.groups = _object("groups", groups)
        self.base_bytes = base_bytes
        self.provenance = _object("provenance", provenance) or {}
        self._validate()

    def _validate(self) -> None:
        from ..factors.int8 import check_factor_dtype
        from ..selection.budget import RankRequest

        check_factor_dtype(self.factor_dtype)
        check_int("rank", self.rank, 1, optional=True)
        RankRequest(self.rank, self.budget, self.rank_step, self.max_rank)
        check_int("calibration_tokens", self.calibration_tokens, 1)
        check_int("sequence_length", self.sequence_length, 2)
        check_int("distill", self.distill, 0)
        check_int("seed", self.seed, 0)
        check_int("version", self.version, 1)
        if not self.is_stored:
            from ..solving.methods.base import get_method

            get_method(self.method)
        if self.format not in FORMATS:
            raise ConfigError(f"format must be one of {', '.join(FORMATS)}, found {self.format!r}.")
        if self.correction is not None and self.calibration is not None:
            raise ConfigError("give either correction (attach a saved one) or calibration (make one), not both.")
        if self.correction is not None and self.factor_dtype != "auto":
            raise ConfigError(
                "factor_dtype is of a correction that is made now; round a saved one with Correction.to_int8() or with "
                "`glowq select --factor-dtype int8`."
            )
        for name, group in (self.groups or {}).items():
            _check_group(name, group)
        if self.groups is not None:
            _check_base_model(self.base_model)
            _check_amount("provenance.total", self.provenance.get("total", 0))

    @property
    def is_stored(self) -> bool:
        """Whether this came from a saved model (it names groups) rather than from a user's request."""
        return self.groups is not None

    @property
    def total(self) -> float:
        """Predicted loss of the whole quantized model, in the unit of the gains.

        It is measured when a correction is made, and kept when groups are cut away; else what the groups left say.
        """
        groups = (self.groups or {}).values()
        return float(self.provenance.get("total", math.fsum(group["total"] for group in groups)))

    def with_groups(self, groups: Mapping[str, Any]) -> GlowQConfig:
        """A copy that stores other groups."""
        return GlowQConfig(**{**self.to_dict(), "groups": dict(groups)})

    def with_format(self, format: str) -> GlowQConfig:
        """A copy for the other saved form, "correction" or "full"."""
        return GlowQConfig(**{**self.to_dict(), "format": format})

    def to_dict(self) -> dict[str, Any]:
        """The fields that config.json stores; what only a request needs (texts, ranks asked for) is left out."""
        base = self.base
        stored = {
            "quant_method": self.quant_method,
            "version": self.version,
            "format": self.format,
            "base": base.to_dict() if hasattr(base, "to_dict") else base,
            "base_model": self.base_model,
            "base_bytes": self.base_bytes,
            "groups": self.groups,
            "method": self.method,
            "seed": self.seed,
            "provenance": self.provenance,
        }
        return copy.deepcopy(stored)

    def to_diff_dict(self) -> dict[str, Any]:
        """Same as `to_dict`: a stored field is never left out for being a default."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: a field is unknown or damaged.
            VersionError: written by a newer format.
        """
        config = cls(**{**config_dict, **kwargs})
        return (config, {}) if return_unused_kwargs else config


def _base(base: Any) -> Any:
    if isinstance(base, str):
        from ..quantizers.registry import base_config

        return base_config(base)
    if isinstance(base, Mapping):
        from ..quantizers.libraries.dense import DenseConfig
        from ..quantizers.registry import backend_of, check_installed, method_of

        if method_of(base) == "dense":  # which transformers does not know
            return DenseConfig()
        backend = backend_of(base)
        if backend is not None:
            check_installed(backend, f"a {method_of(base)} model")
        from transformers.quantizers.auto import AutoQuantizationConfig

        try:
            return AutoQuantizationConfig.from_dict(dict(base))
        except (ValueError, TypeError) as error:
            raise UnknownBaseError(f"base is no quantization config that transformers can read: {error}") from error
    return base


def _unknown_field(name: str) -> str:
    import inspect

    known = [field for field in inspect.signature(GlowQConfig).parameters if field != "unknown"]
    near = get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else f" Known fields: {', '.join(known)}."
    return f"unknown field {name!r} in a glowq configuration.{hint}"


def _object(name: str, value: Any) -> dict[str, Any] | None:
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{name} in config.json must be a JSON object, found {type(value).__name__}.")
    return None if value is None else copy.deepcopy(dict(value))


def _check_group(name: str, group: Any) -> None:
    group = _object(f"group {name!r}", group) or {}
    if set(group) != _GROUP_FIELDS:
        odd = sorted(set(group) ^ _GROUP_FIELDS)[0]
        raise ConfigError(f"group {name!r} in config.json: field {odd!r} is missing or unknown.")
    members, widths, gains = group["members"], group["out_features"], group["gains"]
    if not _strings(members) or not isinstance(widths, Sequence) or len(widths) != len(members) or not members:
        raise ConfigError(f"group {name!r} in config.json needs as many out_features as members.")
    for width in (group["in_features"], *widths):
        check_int(f"a width of group {name!r}", width, 1)
    check_int(f"rank of group {name!r}", group["rank"], 1)
    if not isinstance(gains, Sequence) or isinstance(gains, str) or len(gains) != group["rank"]:
        raise ConfigError(f"group {name!r} in config.json needs one gain a rank.")
    for gain in gains:
        _check_amount(f"a gain of group {name!r}", gain)
    _check_amount(f"total of group {name!r}", group["total"])


def _check_amount(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ConfigError(f"{name} in config.json must be a number of at least 0, found {value!r}.")


def _strings(values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and all(isinstance(v, str) for v in values)


def _check_base_model(base_model: Mapping[str, Any] | None) -> None:
    if base_model is None or set(base_model) != {"name", "revision", "fingerprint"}:
        raise ConfigError("base_model in config.json must hold name, revision and fingerprint.")
    name = base_model["name"]
    if not isinstance(name, str) or not name:
        raise ConfigError("base_model.name in config.json must be a Hub name or a folder.")
    if ".." in name.replace("\\", "/").split("/"):
        raise UnsafePathError(f"base_model.name {name!r} in config.json climbs out of its folder; refused.")
