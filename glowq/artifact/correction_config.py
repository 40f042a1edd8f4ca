"""`CorrectionConfig`: the fields of a `GlowQConfig` and their checks. Neither torch nor transformers is imported."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Self

from ..errors import ConfigError, CorrectionError, NewerFormatWarning, VersionError
from ..quantizers.settings import base_settings
from ..utils.checks import check_int, check_text, json_fault, json_object, shown
from ..utils.names import did_you_mean
from .provenance import Provenance
from .request import CorrectionRequest
from .stored_fields import GROUP_FIELDS, check_base_model, check_group

__all__ = ["FORMAT_MINOR", "FORMAT_VERSION", "CorrectionConfig"]

FORMAT_VERSION = 1
"""Major version of the format of config.json. A newer one is refused."""

FORMAT_MINOR = 3
"""Minor version of the format. Fields of a newer minor version are ignored with a warning.

Version 1 added "minor", "sha256" to a group, "backbone", "subfolder" and "variant" to the base model, and "change" to
the provenance. Version 2 added "mixed" and "instead" to the provenance. Version 3 added factors of 4 and 3 bits, and
renamed "int8" in the provenance to "rounding".
"""

FORMATS = ("correction", "full")
_STORED = ("format", "base_model", "groups", "base_bytes", "provenance")
_OF_A_CUT = ("budget", "rank_step", "max_rank")
_LONGEST = 40  # letters of an unknown field's name that are compared with the known names
_MOST_SHOWN = 8  # names of unknown fields in one warning


class CorrectionConfig:
    """What a config.json stores about a finished correction, or a user's request for one; see `GlowQConfig`."""

    def __init__(
        self,
        base: Any = None,
        *,
        correction: str | None = None,
        version: int = FORMAT_VERSION,
        minor: int = FORMAT_MINOR,
        format: str = "full",
        base_model: Mapping[str, Any] | None = None,
        groups: Mapping[str, Any] | None = None,
        base_bytes: int | None = None,
        provenance: Mapping[str, Any] | Provenance | None = None,
        **options: Any,
    ) -> None:
        options.pop("quant_method", None)
        _check_version(version, minor)
        self.quant_method: Any = "glowq"  # Any: the annotation in transformers allows only its own methods
        self.version = FORMAT_VERSION
        self.minor = FORMAT_MINOR
        known = ["base", *CorrectionRequest.names(), "correction", "version", "minor", *_STORED]
        options = _known_fields("a glowq configuration", options, known, minor)
        if format not in FORMATS:
            raise ConfigError(f"format must be one of {', '.join(FORMATS)}, found {shown(format)}.")
        for name, value in (("base", base), ("base_model", base_model), ("groups", groups), ("provenance", provenance)):
            fault = json_fault(value)
            if fault is not None:
                raise ConfigError(f"{name} in config.json {fault}; refused.")
        # A stored base may need a library that is not installed. It stays a dict until a model is loaded.
        self.base = _stored_base(base) if groups is not None else base_settings(base)
        self.format = format
        self.correction = correction
        self.base_bytes = base_bytes
        self.base_model = None if base_model is None else json_object("base_model", base_model)
        self.groups = None if groups is None else _groups(groups, minor)
        self.provenance = _provenance(provenance, minor)
        self.request: CorrectionRequest | None = None
        if self.groups is None:
            self._ask(options)
        else:
            self._store(options)

    def _ask(self, options: Mapping[str, Any]) -> None:
        """Use the options as a request for a new correction, or to cut a saved one."""
        unstored = {"format": "full", "base_model": None, "base_bytes": None, "provenance": Provenance()}
        for name, default in unstored.items():
            if getattr(self, name) != default:
                raise ConfigError(f"{name} describes a stored correction, and this configuration holds no groups.")
        if self.correction is not None:
            _check_cut(options)
        check_int("rank", options.get("rank"), 1, optional=True)
        self.request = CorrectionRequest(**options)
        self.method, self.seed = self.request.method, self.request.seed

    def _store(self, options: Mapping[str, Any]) -> None:
        """Use the options as the description of a finished correction."""
        asked = sorted({*options, *(["correction"] if self.correction is not None else [])} - {"method", "seed"})
        if asked:
            raise ConfigError(f"{asked[0]} asks for a correction, and this configuration stores one that was made.")
        self.method, self.seed = options.get("method", "glowq"), options.get("seed", 0)
        check_int("seed", self.seed, 0)
        check_text("method", self.method)
        check_int("base_bytes in config.json", self.base_bytes, 0, optional=True)
        check_base_model(self.base_model)

    @property
    def is_stored(self) -> bool:
        """Whether this describes a finished correction (it has groups). False for a user's request."""
        return self.groups is not None

    @property
    def total(self) -> float:
        """Loss of the whole quantized model, in the unit of the gains.

        It is recorded when a correction is made, and does not change when groups are cut away. If it was not recorded,
        it is the sum over the groups that are left.
        """
        if self.provenance.total is not None:
            return float(self.provenance.total)
        return float(math.fsum(group["total"] for group in (self.groups or {}).values()))

    def record(self, **facts: Any) -> None:
        """Set fields of the provenance, see `Provenance`."""
        self.provenance = replace(self.provenance, **facts)

    def with_groups(self, groups: Mapping[str, Any]) -> Self:
        """A copy with other groups."""
        return type(self)(**{**self.to_dict(), "groups": dict(groups)})

    def with_format(self, format: str) -> Self:
        """A copy for the other saved form, "correction" or "full"."""
        return type(self)(**{**self.to_dict(), "format": format})

    def to_dict(self) -> dict[str, Any]:
        """The fields that recreate this configuration: what config.json stores, or the requested settings."""
        base = self.base.to_dict() if hasattr(self.base, "to_dict") else self.base
        always = {"quant_method": self.quant_method, "version": self.version, "minor": self.minor, "base": base}
        if self.request is not None:
            attached = {} if self.correction is None else {"correction": self.correction}
            return copy.deepcopy({**always, **attached, **self.request.asked()})
        stored = {
            **always,
            "format": self.format,
            "base_model": self.base_model,
            "base_bytes": self.base_bytes,
            "groups": self.groups,
            "method": self.method,
            "seed": self.seed,
            "provenance": self.provenance.to_dict(),
        }
        return copy.deepcopy(stored)

    def to_diff_dict(self) -> dict[str, Any]:
        """Same as `to_dict`, because fields with default values must be stored, too."""
        return self.to_dict()

    def __repr__(self) -> str:
        from ..quantizers.registry import method_of

        shown = [f"base={method_of(self.base)!r}"]
        if self.correction is not None:
            shown.append(f"correction={self.correction!r}")
        if self.request is not None:
            shown += [repr(self.request)]
        else:
            shown += [f"format={self.format!r}", f"method={self.method!r}", f"groups={len(self.groups or {})}"]
        return f"{type(self).__name__}({', '.join(shown)})"

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Create a configuration from the fields that `to_dict` returned.

        Raises:
            ConfigError: a field is unknown or damaged.
            VersionError: the fields were written by a newer format.
        """
        config = cls(**{**config_dict, **kwargs})
        return (config, {}) if return_unused_kwargs else config

    @classmethod
    def of_file(cls, where: str, stored: Mapping[str, Any]) -> Self:
        """The finished correction that a config.json describes.

        Args:
            where: the folder or Hub name, for the message.
            stored: its `quantization_config`.

        Raises:
            CorrectionError: it describes no finished correction.
            ConfigError: a field is unknown or damaged.
            VersionError: the fields were written by a newer format.
        """
        if stored.get("groups") is None:
            raise CorrectionError(
                f"{where}: its config.json names glowq and holds no groups of a correction; download or correct again."
            )
        return cls(**stored)


def _check_version(version: Any, minor: Any) -> None:
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise VersionError(
            f"this correction has format version {version}; the installed glowq reads up to {FORMAT_VERSION}. "
            "Upgrade: pip install -U glowq"
        )
    check_int("version", version, 1)
    check_int("minor", minor, 0)


def _known_fields(where: str, found: Mapping[str, Any], known: Iterable[str], minor: int) -> dict[str, Any]:
    """The fields whose names are in `known`.

    If `minor` is newer than this glowq, other fields are left out with a warning. Otherwise they are an error.
    """
    known = list(known)
    unknown = sorted(map(str, set(found) - set(known)))
    if unknown and minor <= FORMAT_MINOR:
        hint = did_you_mean(unknown[0][:_LONGEST], known, f"Known fields: {', '.join(known)}.")
        raise ConfigError(f"unknown field {shown(unknown[0])} in {where}. {hint}")
    if unknown:
        warnings.warn(
            f"{where} holds {', '.join(map(shown, unknown[:_MOST_SHOWN]))}, which format {FORMAT_VERSION}.{minor} has. "
            f"The installed glowq reads format {FORMAT_VERSION}.{FORMAT_MINOR} and ignores this. "
            "Upgrade: pip install -U glowq",
            NewerFormatWarning,
            stacklevel=4,
        )
    return {name: value for name, value in found.items() if name in known}


def _groups(groups: Any, minor: int) -> dict[str, Any]:
    found = {}
    for name, group in json_object("groups", groups).items():
        fields = json_object(f"group {name!r}", group)
        if minor > FORMAT_MINOR:
            fields = _known_fields(f"group {name!r}", fields, GROUP_FIELDS, minor)
        check_group(name, fields)
        found[name] = fields
    return found


def _provenance(provenance: Any, minor: int) -> Provenance:
    if isinstance(provenance, Provenance):
        return provenance
    stored = {} if provenance is None else _renamed(json_object("provenance", provenance))
    return Provenance(**_known_fields("provenance", stored, Provenance.names(), minor))


def _renamed(provenance: dict[str, Any]) -> dict[str, Any]:
    """The provenance with today's name of the figures of rounding, which were "int8" up to version 1.2."""
    figures = provenance.get("int8")
    if "rounding" in provenance or not isinstance(figures, Mapping) or "int8" not in figures:
        return provenance
    others = {name: value for name, value in provenance.items() if name != "int8"}
    return {**others, "rounding": {"rounded" if name == "int8" else name: value for name, value in figures.items()}}


def _check_cut(options: Mapping[str, Any]) -> None:
    """Refuse every option that does not cut a saved correction: the others were decided when it was made."""
    if options.get("calibration") is not None:
        raise ConfigError("give either correction (attach a saved one) or calibration (make one), not both.")
    if options.get("factor_dtype", "auto") != "auto":
        raise ConfigError(
            "factor_dtype is an option of a new correction; round a saved one with Correction.rounded('int8') or with "
            "`glowq select --factor-dtype int8`."
        )
    idle = sorted(set(options) - {*_OF_A_CUT, "calibration", "factor_dtype"})
    if idle:
        raise ConfigError(
            f"{idle[0]} is an option of a new correction, and has no effect on a saved one. Together with correction, "
            f"give only options that cut it: {', '.join(_OF_A_CUT)}."
        )


def _stored_base(base: Any) -> Any:
    if not isinstance(base, Mapping):
        return base_settings(base)
    from ..quantizers.settings import check_settings

    check_settings("base in config.json", base)
    return dict(base)
