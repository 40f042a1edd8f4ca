"""Hypothesis strategies of damaged and hostile files: changes of a JSON value, of bytes, and of a safetensors header.

A strategy draws a function that takes the undamaged value and returns the changed one.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

__all__ = ["ByteChanges", "byte_changes", "header_changes", "header_of", "json_changes", "with_header"]

JsonChange = Callable[[Any], Any]
ByteChange = Callable[[bytes], bytes]

_PLACES = st.integers(0, 2**16)  # which of the values, or of the bytes: modulo their number


def _deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


# Numbers at the ends of their types, names that have a meaning, and values that libraries are known to stumble over.
_NUMBERS = [0, 1, -1, 2, 3, 64, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400]
_FLOATS = [0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf")]
_TEXTS = ["", " ", "a\0b", "../../etc/passwd", "/dev/zero", "a/b", "\ud800", "x" * 10_000, "\n", "\u202e", "é", "%s{0}"]
_NAMES = ["nf4", "fp4", "auto", "float16", "float32", "uint8", "glowq", "bitsandbytes", "gptq", "torchao", "dense"]
_NAMES += ["correction", "full", "llama", "bert", "LlamaForCausalLM", "silu", "main", "q", "I8", "F32", "BF16", "F64"]
_PATTERNS = ["(a+)+$", ".*.*.*.*.*x", "[", "re:.*", "*", "lm_head", "(a|a)*b"]
_SHAPES: list[Any] = [
    [],
    {},
    [[]],
    [0],
    [1],
    [1, 1],
    [-1, 1],
    [2**62, 2**62],
    [0, 2**63],
    {"a": 1},
    _deep(30),
    _deep(70),
]
_CORNERS = [None, True, False, *_NUMBERS, *_FLOATS, *_TEXTS, *_NAMES, *_PATTERNS, *_SHAPES]

_TEXT = st.text(st.characters(codec=None), max_size=8)
_CORNER = st.sampled_from(_CORNERS)
_PLAIN = st.one_of(_CORNER, _CORNER, _CORNER, st.integers(-5, 300), st.floats(), _TEXT)
_NESTED = st.one_of(st.lists(_PLAIN, max_size=3), st.dictionaries(_TEXT, _PLAIN, max_size=2))
_VALUES = st.one_of(_CORNER, _CORNER, _CORNER, _PLAIN, _NESTED)


def json_changes(most: int = 3) -> st.SearchStrategy[JsonChange]:
    """One to `most` changes of a JSON value: of a value in it, of its place, or of the name of a field."""
    names = [*_JSON, "replace", "replace", "replace", "tweak"]
    one = st.tuples(st.sampled_from(names), _PLACES, _PLACES, _VALUES)
    return st.lists(one, min_size=1, max_size=most).map(_JsonChanges)


def byte_changes(start: int, most: int = 3) -> st.SearchStrategy[ByteChange]:
    """One to `most` changes of bytes; half of them within the first `start` bytes, such as those of a header."""
    one = st.tuples(
        st.sampled_from(list(_BYTES)),
        st.one_of(st.integers(0, start), _PLACES),
        _PLACES,
        st.binary(min_size=1, max_size=9),
    )
    return st.lists(one, min_size=1, max_size=most).map(ByteChanges)


def header_changes() -> st.SearchStrategy[ByteChange]:
    """Changes of the JSON header of a safetensors file; the header's length is right again."""
    return json_changes().map(_HeaderChanges)


def header_of(content: bytes) -> tuple[Any, bytes]:
    """The header of a safetensors file, and the bytes of its values."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: Any, values: bytes) -> bytes:
    """A safetensors file with that header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


class _Changes:
    """Changes with a `repr` that shows what was drawn."""

    def __init__(self, drawn: Any) -> None:
        self.drawn = drawn

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.drawn!r})"


class _JsonChanges(_Changes):
    def __call__(self, value: Any) -> Any:
        holder = {"root": copy.deepcopy(value)}
        for name, place, other, new in self.drawn:
            nodes = list(_nodes(holder["root"]))
            if nodes:
                _JSON[name](*nodes[place % len(nodes)], nodes[other % len(nodes)], copy.deepcopy(new))
        return holder["root"]


class _HeaderChanges(_Changes):
    def __call__(self, content: bytes) -> bytes:
        header, values = header_of(content)
        return with_header(self.drawn(header), values)


class ByteChanges(_Changes):
    """What `byte_changes` draws."""

    def __call__(self, content: bytes) -> bytes:
        for name, place, other, new in self.drawn:
            at = place % max(1, len(content))
            content = _BYTES[name](content, at, other, new)
        return content


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every value inside of a JSON value, as the object or list that holds it and the key or index there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, found in list(inner):
        yield value, key
        yield from _nodes(found)


def _rename(holder: Any, key: Any, other: Any, new: Any) -> None:
    if isinstance(holder, dict):
        holder[new if isinstance(new, str) else f"{key}{new!r:.5}"] = holder.pop(key)


def _add(holder: Any, key: Any, other: Any, new: Any) -> None:
    if isinstance(holder, dict):
        holder[f"{key}_"] = new
    else:
        holder.insert(key, new)


def _swap(holder: Any, key: Any, other: Any, new: Any) -> None:
    there, place = other
    holder[key], there[place] = copy.deepcopy(there[place]), copy.deepcopy(holder[key])


def _tweak(holder: Any, key: Any, other: Any, new: Any) -> None:
    value = holder[key]
    if isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, int | float):
        holder[key] = (value + 1, value - 1, value * 2, -value)[(new if isinstance(new, int) else 0) % 4]
    elif isinstance(value, str):
        holder[key] = value[:-1] + chr((ord(value[-1]) + 1) % 0xD800) if value else "x"
    else:
        holder[key] = [value]


_JSON: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "replace": lambda holder, key, other, new: holder.__setitem__(key, new),
    "remove": lambda holder, key, other, new: holder.pop(key),
    "rename": _rename,
    "add": _add,
    "swap": _swap,
    "copy": lambda holder, key, other, new: holder.__setitem__(key, copy.deepcopy(other[0][other[1]])),
    "tweak": _tweak,
}

_BYTES: dict[str, Callable[[bytes, int, int, bytes], bytes]] = {
    "flip": lambda text, at, other, new: (
        text[:at] + bytes(byte ^ (1 << other % 8) for byte in text[at : at + 1]) + text[at + 1 :]
    ),
    "write": lambda text, at, other, new: text[:at] + new + text[at + len(new) :],
    "insert": lambda text, at, other, new: text[:at] + new + text[at:],
    "remove": lambda text, at, other, new: text[:at] + text[at + 1 + other % 16 :],
    "cut": lambda text, at, other, new: text[:at],
    "repeat": lambda text, at, other, new: text[: at + 1 + other % 64] + text[at:],
    "zero": lambda text, at, other, new: (
        text[:at] + bytes(len(text[at : at + 1 + other % 64])) + text[at + 1 + other % 64 :]
    ),
    "length": lambda text, at, other, new: struct.pack("<Q", other << (new[0] % 48)) + text[8:],
}
