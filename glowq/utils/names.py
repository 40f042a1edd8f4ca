"""Names as users write them, and names in messages."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

__all__ = ["did_you_mean", "some_of", "split_revision", "unknown_base", "unknown_export", "unknown_method"]

_NAMED = 3


def split_revision(name: str | os.PathLike[str]) -> tuple[str, str | None]:
    """Split "org/model@revision" into the name and the revision.

    The revision is None if the name has none. The path of an existing file or folder is never split.

    Args:
        name: folder or Hub name; "@" and a branch, tag or commit may follow.
    """
    text = os.fspath(name)
    repository, _, revision = text.partition("@")
    return (text, None) if not revision or os.path.exists(text) else (repository, revision)


def some_of(names: Sequence[str]) -> str:
    """The first of many names, and the number of the others, for a message."""
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A sentence with the known name that is most like `name`; `otherwise` if none is like it."""
    near = get_close_matches(name, list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else otherwise


# The command line refuses these names before it imports the registries that know them.


def unknown_base(name: str, known: Iterable[str]) -> str:
    """The message for a base quantizer that is not known."""
    names = sorted(known)
    return f"unknown base quantizer {name!r}; expected one of {', '.join(names)}. {did_you_mean(name, names)}".rstrip()


def unknown_method(name: str, known: Iterable[str]) -> str:
    """The message for a method that is not known."""
    names = sorted(known)
    return f"method must be one of {', '.join(names)}; found {name!r}. {did_you_mean(name, names)}".rstrip()


def unknown_export(name: str, known: Iterable[str]) -> str:
    """The message for an export format that is not known."""
    return f"no export format {name!r}. " + did_you_mean(name, known, f"There are {', '.join(known)}.")
