"""A quantization config from a file: its checks, before the library that it is for reads it, and its object.

A config.json comes from whoever uploaded it, and the libraries take what it holds as it is: the name of a dtype becomes
`getattr(torch, name)`, and names of modules become regular expressions.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from ..errors import ConfigError, UnknownBaseError, one_line
from ..utils.checks import is_number, shown
from .registry import backend_of, base_config, check_installed, method_of, methods

__all__ = ["base_settings", "check_dtype", "check_settings"]

_LONGEST_TEXT = 100_000  # letters; a calibration text or a chat template may be among the settings
# Fields whose texts, or whose keys, transformers or the library use as regular expressions on the names of modules.
_PATTERNS = frozenset(
    {
        "dynamic",
        "exclude",
        "fqn_to_config",
        "ignore",
        "ignored_layers",
        "include",
        "llm_int8_skip_modules",
        "module_fqn_to_config",
        "modules_in_block_to_quantize",
        "modules_to_not_convert",
        "skip_modules",
        "targets",
    }
)
_RAW = ("llm_int8_skip_modules", "modules_to_not_convert")  # transformers uses these texts as they are
_PREFIXES = ("re:", "+:", "-:")  # of compressed-tensors, torchao and gptqmodel: a regular expression follows
_DTYPES = ("dtype", "bnb_4bit_quant_storage")  # ends of the names of fields that hold a dtype
# torch is not imported to check these. It has had all of them since before the oldest version that glowq runs with.
_COMMON_DTYPES = frozenset(
    {"bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "uint8"} | {f"int{bits}" for bits in range(1, 9)}
)
# The number of steps that matching a pattern may take on a name of _NAME letters. It allows three ".*" in one pattern.
_MOST_STEPS = 2**20
_NAME = 64


def check_settings(where: str, settings: Mapping[str, Any]) -> None:
    """Refuse a quantization config with values that no quantizer has, or that would do harm.

    Args:
        where: what the config is, for the message ("base in config.json").
        settings: the fields, as JSON stores them.

    Raises:
        UnknownBaseError: the quantizer is none that glowq reads.
        ConfigError: a value is neither a plain value nor an object nor a list, the name of a dtype is none, or a
            pattern of module names is no regular expression or could take very long to match.
    """
    method = settings.get("quant_method")
    legacy = method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit"))  # of bitsandbytes
    if not legacy and method_of(settings) not in {*methods(), "dense"}:
        found = shown(getattr(method, "value", method))
        raise UnknownBaseError(
            f"{where} names the quantizer {found}, which glowq does not read; it reads {', '.join(methods())}."
        )
    check_values(where, settings)


def check_values(where: str, settings: Mapping[str, Any]) -> None:
    """As `check_settings`, for the config of any quantizer."""
    steps = 0
    for path, name, value in _values(where, settings, ""):
        if isinstance(value, str):
            if len(value) > _LONGEST_TEXT or "\0" in value:
                raise ConfigError(f"{path} is no text of a quantization config: {shown(value)}.")
            if name.endswith(_DTYPES):
                check_dtype(path, value)
            if name in _PATTERNS or value.startswith(_PREFIXES):
                steps += _steps_of(path, value if name in _RAW else _unprefixed(value))
        elif name in _PATTERNS and value is not None and not isinstance(value, bool):
            raise ConfigError(f"{path} must hold names of modules, found {shown(value)}.")
        elif not (value is None or isinstance(value, bool | Enum) or is_number(value) or _is_dtype(value)):
            raise ConfigError(f"{path} holds {shown(value)}, which no quantization config does.")
    if steps > _MOST_STEPS:
        raise ConfigError(f"the patterns of module names in {where} could take very long to match; refused.")


def _values(path: str, value: Any, name: str) -> Iterator[tuple[str, str, Any]]:
    """Yield the path, the nearest field's name and the value of every plain value in nested settings."""
    if isinstance(value, Mapping):
        if value.get("_type") == "torch.dtype":  # as torchao writes a dtype
            name = "dtype"
            yield path, name, value.get("_data")
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{path} has a field whose name is {shown(key)}, expected a text.")
            if name in _PATTERNS or key.startswith(_PREFIXES):
                yield f"{path}: the key {shown(key)}", name or key, key
                yield from _values(f"{path}.{shown(key)}", inner, "")
            else:
                yield from _values(f"{path}.{key if key.isidentifier() else shown(key)}", inner, key)
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            if inner is None and name in _PATTERNS:
                raise ConfigError(f"{path} must hold names of modules, found None.")
            yield from _values(path, inner, name)
    else:
        yield path, name, value


def check_dtype(path: str, value: str) -> None:
    """Refuse the name of a dtype that torch does not have: libraries take the attribute of torch with that name.

    Raises:
        ConfigError: the message names the field.
    """
    name = value.removeprefix("torch.")
    if value == "auto" or name in _COMMON_DTYPES:
        return
    import torch

    if not name.isidentifier() or not _is_dtype(getattr(torch, name, None)):
        raise ConfigError(f"{path} must be a dtype of torch, found {shown(value)}.")


def _is_dtype(value: Any) -> bool:
    torch = sys.modules.get("torch")  # no value is a dtype of torch before torch is imported
    return torch is not None and isinstance(value, torch.dtype)


def _steps_of(path: str, pattern: str) -> int:
    """A bound on the steps that a match takes on a name of `_NAME` letters.

    Raises:
        ConfigError: it is no regular expression, or the bound is too large.
    """
    try:
        # In a group, because transformers puts it in one. `re` has no public parser.
        steps = _sequence(re._parser.parse(f"(?:{pattern})"))  # type: ignore[attr-defined]
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{path} is no regular expression: {shown(pattern)} ({error}).") from error
    if steps > _MOST_STEPS:
        raise ConfigError(f"{path} holds a pattern that could take very long to match: {shown(pattern)}; refused.")
    return steps


def _unprefixed(pattern: str) -> str:
    return pattern[pattern.index(":") + 1 :] if pattern.startswith(_PREFIXES) else pattern


def _sequence(items: Any) -> int:
    steps = 1
    for operation, argument in items:
        steps = min(steps * _one(str(operation), argument), 2 * _MOST_STEPS)
    return steps


def _one(operation: str, argument: Any) -> int:
    """The number of ways in which one item of a parsed pattern can match, or a larger number."""
    if operation in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        least, most, item = argument
        most = min(int(most), _NAME)
        ways = _sequence(item)
        if ways == 1:
            return int(max(1, most - min(int(least), most) + 1))
        return int(min(ways + 1, 2 * _MOST_STEPS) ** most) if most else 1
    if operation == "BRANCH":
        return sum(_sequence(branch) for branch in argument[1])
    if operation == "SUBPATTERN":
        return _sequence(argument[-1])
    if operation == "ATOMIC_GROUP":
        return _sequence(argument)
    if operation in ("ASSERT", "ASSERT_NOT"):
        return _sequence(argument[1])
    if operation == "GROUPREF_EXISTS":
        return sum(_sequence(branch) for branch in argument[1:] if branch is not None)
    return 1  # a letter, a set, a position, or what an earlier group matched


def base_settings(base: Any) -> Any:
    """The base's quantization config as an object of transformers.

    Args:
        base: a `--base` name, the dict of a config, or the object itself.

    Raises:
        UnknownBaseError: no such name or method, or its library is not installed.
        ConfigError: a field of the dict holds a value that no quantizer has there, or `base` is something else.
    """
    if isinstance(base, str):
        return base_config(base)
    if isinstance(base, Mapping):
        from .loading.dense import DenseConfig

        check_settings("base", base)
        if method_of(base) == "dense":  # a method that transformers does not have
            return DenseConfig()
        backend = backend_of(base)
        if backend is not None:
            check_installed(backend, f"a {method_of(base)} model")
        from transformers.quantizers.auto import AutoQuantizationConfig

        try:
            return AutoQuantizationConfig.from_dict(dict(base))
        except Exception as error:  # the libraries' classes raise whatever they meet in a wrong field
            raise UnknownBaseError(
                f"base is no quantization config that transformers can read: {type(error).__name__}: {one_line(error)}"
            ) from error
    if base is not None and not hasattr(base, "to_dict"):
        raise ConfigError(f"base must be a name, a quantization config or its JSON object, found {shown(base)}.")
    return base
