"""Names of models as users write them."""

from __future__ import annotations

import os

__all__ = ["split_revision"]


def split_revision(name: str | os.PathLike[str]) -> tuple[str, str | None]:
    """Split "org/model@revision" into the name and the revision.

    The revision is None if the name has none. The path of an existing file or folder is never split.

    Args:
        name: folder or Hub name; "@" and a branch, tag or commit may follow.
    """
    text = os.fspath(name)
    repository, _, revision = text.partition("@")
    return (text, None) if not revision or os.path.exists(text) else (repository, revision)
