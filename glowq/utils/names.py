"""Names of models as users write them, and names of modules in messages."""

from __future__ import annotations

import os
from collections.abc import Sequence

__all__ = ["some_of", "split_revision"]

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
