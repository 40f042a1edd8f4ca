"""Names of models as users write them."""

from __future__ import annotations

import os

__all__ = ["split_revision"]


def split_revision(name: str | os.PathLike[str]) -> tuple[str, str | None]:
    """The name and the revision of "org/model@revision"; a folder's name is all name.

    Args:
        name: folder or Hub name, with a branch, tag or commit behind an "@" or without.
    """
    text = os.fspath(name)
    repository, _, revision = text.partition("@")
    return (text, None) if not revision or os.path.exists(text) else (repository, revision)
