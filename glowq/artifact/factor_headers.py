"""Check the factors of a correction by the headers of their files. No factor is read, and torch is not imported."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ..errors import CorrectionError
from ..models.headers import Headers
from ..selection.allocation import GroupGains
from ..utils.files import check_regular
from .correction_config import CorrectionConfig
from .factor_layout import FACTOR_KEYS, ITEMSIZES, bits_of_header, layout, stored_group

__all__ = ["FactorHeaders", "read_factor_headers", "read_stored"]


class _Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    where: str | Path


@dataclass(frozen=True)
class FactorHeaders:
    """What the headers of a correction's files say about its factors.

    Attributes:
        group_gains: one entry per group, with one gain per stored rank.
        bits: group name -> bits per value of its factors; None for floats.
    """

    group_gains: list[GroupGains]
    bits: Mapping[str, int | None]

    @property
    def factor_bytes(self) -> int:
        """Bytes of all factors."""
        return sum(len(item.gains) * item.rank_bytes for item in self.group_gains)


def read_factor_headers(files: Sequence[Path], groups: Mapping[str, Mapping[str, Any]]) -> FactorHeaders:
    """Read and check the headers of the factors of `groups` in safetensors files. Other tensors are ignored.

    Args:
        files: files that together hold every factor of `groups`, and no factor of another group.
        groups: group name -> description, as config.json stores them.

    Raises:
        CorrectionError: a file is corrupt or truncated, or a factor is missing, extra or misshaped.
        ReadError: a file is no regular file.
    """
    return _check({name: header for file in files for name, header in _headers(file)}, groups)


def read_stored(name: str, headers: Headers) -> tuple[CorrectionConfig, FactorHeaders]:
    """The description and the factors of a correction or a full model, from its config.json and headers alone.

    Args:
        name: folder or Hub name, for messages.
        headers: see `glowq.models.headers.read_headers`; its config must name glowq.

    Raises:
        CorrectionError: the config describes no finished correction, or a factor is missing, extra or misshaped.
        ConfigError: a field of the config is unknown or damaged.
        VersionError: the config was written by a newer format.
    """
    config = CorrectionConfig.of_file(name, headers.config["quantization_config"])
    factors = {
        tensor: _Header(shape, headers.dtypes[tensor], name)
        for tensor, shape in headers.shapes.items()
        if re.search(FACTOR_KEYS, tensor)
    }
    return config, _check(factors, config.groups or {})


def _check(headers: Mapping[str, _Header], groups: Mapping[str, Mapping[str, Any]]) -> FactorHeaders:
    """Refuse factors that are missing, extra or misshaped."""
    unmatched, group_gains, bits = dict(headers), [], {}
    for name, stored in groups.items():
        found = headers.get(f"{name}.right")
        bits[name] = None if found is None else bits_of_header(found.dtype, found.shape)
        group, rank = stored_group(name, stored), int(stored["rank"])
        size = sum(
            prod(shape) * ITEMSIZES[_checked(unmatched.pop(tensor, None), tensor, shape, dtypes).dtype]
            for tensor, (shape, dtypes) in layout(group, rank, bits[name]).items()
        )
        group_gains.append(GroupGains(group, size // rank, [float(gain) for gain in stored["gains"]]))
    if unmatched:
        raise CorrectionError(
            f"extra factor {min(unmatched)!r} ({len(unmatched)} in all) that no group of config.json names; the file "
            "and its config.json do not belong together. Download or correct again."
        )
    return FactorHeaders(group_gains, bits)


def _headers(file: Path) -> list[tuple[str, _Header]]:
    """The tensors of factors in a file."""
    if check_regular(file) is None:
        raise CorrectionError(f"{file} is missing; download the correction again.")
    try:
        with safe_open(file, framework="numpy") as opened:
            names = opened.keys()
            slices = {name: opened.get_slice(name) for name in names if re.search(FACTOR_KEYS, name)}
            found = [(name, tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()]
    except SafetensorError as error:
        raise CorrectionError(f"{file} is corrupt or truncated ({error}); download the correction again.") from error
    return [(name, _Header(shape, dtype, file)) for name, shape, dtype in found]


def _checked(found: _Header | None, name: str, shape: tuple[int, ...], dtypes: Sequence[str]) -> _Header:
    """Refuse a factor that is missing, or that has another shape or dtype than its group."""
    if found is None:
        raise CorrectionError(f"factor {name!r} is missing; the correction is incomplete. Download or correct again.")
    if found.shape != shape or found.dtype not in dtypes:
        raise CorrectionError(
            f"factor {name!r} in {found.where} has shape {found.shape} and dtype {found.dtype}, expected "
            f"{' or '.join(dtypes)} of shape {shape}. Download or correct again."
        )
    return found
