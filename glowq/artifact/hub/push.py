"""Push a saved correction, a self-contained corrected model or an export to the Hub, in one commit.

This file calls `create_commit` and not `upload_folder`, because `upload_folder` commits a large folder in several
parts: an interrupted upload would leave an incomplete model on the branch. `create_commit` first uploads every large
file, and commits at the end. If xet is installed, an interrupted upload keeps the parts that have arrived.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelInfo
from yaml import YAMLError  # type: ignore[import-untyped]

from ..._version import __version__
from ...errors import ConfigError, HubError, ModelNotFoundError, one_line
from ...utils.files import checkpoint_files, read_json
from ...utils.hub import asking_hub
from ..card import CARD, PICTURE, base_license, card_files, license_of
from ..correction_config import CorrectionConfig
from ..saved import FACTORS_FILE
from .contents import SavedResult, read_result, stored_gains

__all__ = ["push"]

_TEXTS = (".json", ".md", ".jinja", ".txt")
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", FACTORS_FILE)  # files of any earlier push


@dataclass(frozen=True)
class _Base:
    """The base on the Hub, at one commit. `compared`: whether its weights were found equal to a local folder's."""

    name: str
    revision: str
    info: ModelInfo
    compared: bool

    @property
    def facts(self) -> dict[str, Any]:
        gated = bool(self.info.gated)
        return {"name": self.name, "revision": self.revision, "gated": gated, "compared": self.compared}


def push(
    folder: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> dict[str, Any]:
    """Upload a folder that glowq saved to a model repository, in one commit. The folder itself is not changed.

    Args:
        folder: folder of a correction, a self-contained corrected model, or an export.
        repo_id: "name" or "organization/name"; created if missing.
        base_model: Hub name of the base; stored instead of the local folder that the correction was made on.
        base_revision: branch, tag or commit of `base_model`; the commit that it names now is stored.
        private: whether a new repository is private.
        create_pr: open a pull request instead; the repository may belong to somebody else.
        revision: branch to push to, created if missing; or a pull request, "refs/pr/1".
        commit_message: first line of the commit message.
        token: access token; None uses the token that `hf auth login` stored.

    Returns:
        "kind", "repository", "revision", "commit" (URL), "oid", "pull_request" (URL or None), "base_model" ({"name",
        "revision", "gated", "compared"}, or None), "files" (name -> bytes), "bytes", "left_out".

    Raises:
        ModelNotFoundError: no such folder, it holds nothing that glowq saved, or the base is not on the Hub.
        PickleRefusedError: the folder holds a pickle.
        ConfigError: the base is a local folder, a file names a folder of this machine, or two arguments exclude each
            other.
        CorrectionError: a file is corrupt, or a factor is missing.
        HubError: the Hub refuses, cannot be reached, or the upload was interrupted; then nothing was committed.
    """
    if create_pr and revision is not None:
        raise ConfigError("a pull request is opened against the main branch: give create_pr or revision, not both.")
    if base_revision is not None and base_model is None:
        raise ConfigError("base_revision is a revision of base_model: give both.")
    result = read_result(Path(folder))
    _check_base(result, repo_id, base_model, create_pr or revision is not None)
    api = HfApi(token=token, library_name="glowq", library_version=__version__)
    base = _find_base(api, result, base_model, base_revision)
    _refuse_local_paths(result, _files_to_upload(result, repo_id, base))
    with asking_hub(repo_id, {"revision": revision}, writing=True):
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        files = _files_to_upload(result, repository, base)
        stale = _stale(api, repository, revision, files) if result.kind != "export" else []
        additions = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        commit = api.create_commit(
            repository,
            [*additions, *map(CommitOperationDelete, stale)],
            commit_message=commit_message or f"Upload glowq {'model' if result.kind == 'full' else result.kind}",
            revision=revision,
            create_pr=create_pr,
        )
    sizes = {addition.path_in_repo: addition.upload_info.size for addition in additions}
    return {
        "kind": result.kind,
        "repository": repository,
        "revision": commit.pr_revision or revision or "main",
        "commit": commit.commit_url,
        "oid": commit.oid,
        "pull_request": commit.pr_url,
        "base_model": None if base is None else base.facts,
        "files": sizes,
        "bytes": sum(sizes.values()),
        "left_out": result.left_out,
    }


def _check_base(result: SavedResult, repo_id: str, base_model: str | None, is_aside: bool) -> None:
    name = base_model if base_model is not None else result.base[0] if result.base is not None else None
    if base_model is not None and result.config is None:
        raise ConfigError(f"{result.folder} is an export: push the correction with base_model, then export that one.")
    if name is not None and Path(name).is_absolute() and result.needs_base:
        how = (
            "Push the correction, then export that one."
            if result.config is None
            else "Push that folder first, then name it: --base-model org/base (base_model='org/base' in Python)."
        )
        raise ConfigError(
            f"the base of this {result.kind} is the local folder {name!r}, which nobody else can load. {how}"
        )
    if name == repo_id and not is_aside:
        raise ConfigError(f"{repo_id} is the base itself, which would be replaced; choose another name.")


def _find_base(api: HfApi, result: SavedResult, base_model: str | None, base_revision: str | None) -> _Base | None:
    """The base on the Hub, at the commit that its revision names now; None if the result works without it.

    Raises:
        ModelNotFoundError: the base is not on the Hub, and it is needed or was named by the user.
        HubError: the base on the Hub is another model than the local base.
    """
    if result.base is None or (base_model is None and Path(result.base[0]).is_absolute()):
        return None
    name, revision = result.base if base_model is None else (base_model, base_revision)
    try:
        with asking_hub(name, {"revision": revision}):
            info = api.model_info(name, revision=revision, files_metadata=True)
    except ModelNotFoundError:
        if result.needs_base or base_model is not None:
            raise
        return None
    if not info.sha:
        raise HubError(f"the Hub names no commit of {name}; try again later.")
    local = Path(result.base[0])
    return _Base(name, info.sha, info, base_model is not None and local.is_dir() and _compare(local, info))


def _compare(local: Path, info: ModelInfo) -> bool:
    """Compare the weight files of the local base with those on the Hub.

    Returns:
        True if all are equal, False if a file's name does not exist on the Hub, so that they cannot be compared.

    Raises:
        HubError: a file on the Hub has the same name but another content.
    """
    theirs = {sibling.rfilename: sibling.lfs.sha256 for sibling in info.siblings or () if sibling.lfs is not None}
    ours = [Path(file) for file in checkpoint_files(local)]
    if any(file.name not in theirs for file in ours):
        return False
    for file in ours:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != theirs[file.name]:
            raise HubError(
                f"{info.id} at {info.sha} is another model than the base {local}: its {file.name} differs. Name the "
                "repository and revision that hold what was corrected."
            )
    return True


def _files_to_upload(result: SavedResult, repository: str, base: _Base | None) -> dict[str, Path | bytes]:
    """The files to upload. config.json and the card get the base's Hub name and commit; the card gets its license.

    If a user has edited the card, its text is kept, and only missing metadata is added.
    """
    if result.config is None:
        return dict(result.files)
    config, mine = result.config, result.folder / CARD
    group_gains, earlier = stored_gains(result.folder, config), _card(mine)
    license = base_license(config.base_model or {}) if earlier is None else license_of(earlier.data.to_dict())
    made = card_files(config, group_gains, license=license, picture=PICTURE in result.files)
    changed: dict[str, bytes] = {}
    stored = read_json(result.folder / "config.json")
    named = stored["quantization_config"]["base_model"]
    # A self-contained model works without its base, so a local folder is named there without its path.
    local = Path(named["name"]).name if Path(named["name"]).is_absolute() else named["name"]
    name, published = (local, named["revision"]) if base is None else (base.name, base.revision)
    if (named["name"], named["revision"]) != (name, published):
        named.update(name=name, revision=published)
        changed["config.json"] = json.dumps(stored, indent=2, sort_keys=True).encode() + b"\n"
        config = CorrectionConfig.from_dict(stored["quantization_config"])
    if base is not None:
        license = license_of(base.info.card_data.to_dict() if base.info.card_data else {}) or license
    if earlier is None or made[CARD] == mine.read_bytes():
        changed.update(card_files(config, group_gains, license=license, repository=repository))
    else:
        stated = {"base_model": base.name, "base_model_relation": "quantized"} if base is not None else {}
        for key, value in {**license, **stated}.items():
            if earlier.data.get(key) is None:
                earlier.data[key] = value
        changed[CARD] = str(earlier.content).encode()
    return {**result.files, **changed}


def _refuse_local_paths(result: SavedResult, files: Mapping[str, Path | bytes]) -> None:
    """Refuse to publish a text file that names a folder of this machine.

    Raises:
        ConfigError: the message names the file and the folder.
    """
    base = Path(result.base[0]) if result.base is not None else None
    places = {Path.home(), Path.cwd(), result.folder.resolve().parent, *([base] if base is not None else [])}
    private = sorted(str(place) for place in places if place.is_absolute() and place != Path(place.anchor))
    for name, content in files.items():
        if not name.endswith(_TEXTS):
            continue
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode(errors="replace")
        for place in private:
            if place in text:
                raise ConfigError(
                    f"{name} names {place}, a folder of this machine, which would be published. Remove it from "
                    f"{result.folder / name}, or correct again with names that others may know."
                )


def _card(file: Path) -> ModelCard | None:
    try:
        return ModelCard.load(file, ignore_metadata_errors=True) if file.is_file() else None
    except (ValueError, YAMLError) as error:
        raise HubError(f"the metadata of {file} cannot be read ({one_line(error)}); repair or remove it.") from error


def _stale(api: HfApi, repository: str, revision: str | None, files: Mapping[str, Any]) -> list[str]:
    """Weight files of an earlier push that this push does not replace. transformers would still load them."""
    there = api.list_repo_files(repository, revision=revision)
    return [name for name in there if name not in files and any(fnmatch(name, pattern) for pattern in _WEIGHTS)]
