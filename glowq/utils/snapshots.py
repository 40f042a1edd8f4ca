"""The local folder of a model: the folder that a user names, or the downloaded files of a Hub repository."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ModelNotFoundError
from .files import refuse_irregular, refuse_only_pickles, safe_join
from .names import split_revision

__all__ = ["local_snapshot"]


def local_snapshot(name: str | os.PathLike[str], *, subfolder: str | None = None, **hub_kwargs: Any) -> Path:
    """Return the local folder of a model; the safetensors, JSON and tokenizer files of a Hub model are downloaded.

    Args:
        name: folder or Hub name, or "org/model@revision".
        subfolder: folder of the model inside of it; only its files are downloaded.
        **hub_kwargs: passed to `huggingface_hub.snapshot_download`, e.g. `revision`, `token`, `local_files_only`.

    Raises:
        ConfigError: `name` and `revision` give different revisions.
        ModelNotFoundError: no folder or repository has that name and revision, or only local files are allowed and the
            model is not in the cache.
        HubError: the repository is gated, the token is not valid, or the Hub cannot be reached.
        PickleRefusedError: the repository stores its weights only as pickles, which are not downloaded.
        OutputError: the disk is full.
        ReadError: a file of the folder is no regular file.
        UnsafePathError: `subfolder` points outside of the folder.
    """
    if os.path.isdir(name):
        return _checked_folder(Path(name), subfolder)
    from huggingface_hub import HfApi, constants, snapshot_download

    from .hub import asking_hub

    name, revision = split_revision(name)
    if revision is not None:
        if hub_kwargs.get("revision") not in (None, revision):
            raise ConfigError(f"{name}@{revision} names another revision than revision={hub_kwargs['revision']!r}.")
        hub_kwargs["revision"] = revision
    patterns = [
        "*.json",
        "model*.safetensors",
        "glowq.safetensors",
        "adapter_model.safetensors",
        "*.model",
        "*.txt",
        "*.jinja",
    ]
    if subfolder:
        patterns = [f"{subfolder}/{pattern}" for pattern in patterns]
    with asking_hub(name, hub_kwargs):
        folder = Path(snapshot_download(name, allow_patterns=patterns, **hub_kwargs))
        asked = not (constants.HF_HUB_OFFLINE or hub_kwargs.get("local_files_only"))
        if subfolder:
            return _checked_folder(folder, subfolder)
        if asked and not any(folder.glob("*.safetensors")):
            api = HfApi(token=hub_kwargs.get("token"))
            refuse_only_pickles(name, api.list_repo_files(name, revision=folder.name))
    return folder


def _checked_folder(folder: Path, subfolder: str | None) -> Path:
    found = safe_join(folder, subfolder) if subfolder else folder
    if not found.is_dir():
        raise ModelNotFoundError(f"{folder} has no folder {subfolder!r}.")
    refuse_irregular(found)
    return found
