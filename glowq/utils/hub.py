"""Turn failures of the Hub and of the network into errors of glowq that say what to do."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import GlowQError, HubError, ModelNotFoundError, OutputError, ReadError

__all__ = ["asking_hub"]


# The base class of HTTP errors in httpx or its successor, depending on the version of huggingface_hub.
_TransportError: Any = HfHubHTTPError.__bases__[0]


@contextmanager
def asking_hub(name: str, options: Mapping[str, Any] | None = None, *, writing: bool = False) -> Iterator[None]:
    """Turn what huggingface_hub raises about the repository `name` into a one-line error of glowq.

    Args:
        name: name of the repository, as the user gave it.
        options: what huggingface_hub was called with; only "revision" and "local_files_only" are used.
        writing: whether files are pushed to the repository rather than read from it.

    Raises:
        ModelNotFoundError: the repository or revision does not exist, or there is no network and nothing in the cache.
        HubError: the Hub refuses the request or cannot be reached, or the connection was lost.
        ReadError: a local file cannot be read or written.
        OutputError: the disk is full.
    """
    try:
        yield
    except GlowQError:
        raise
    except (OSError, HFValidationError, _TransportError) as error:
        raise _translated(error, name, options or {}, writing) from error
    except RuntimeError as error:
        if not _is_of_transfer(error):
            raise
        raise _translated(error, name, options or {}, writing) from error


def _is_of_transfer(error: RuntimeError) -> bool:
    """Whether hf_xet raised this. Its compiled code has no frame, so that huggingface_hub's is the last one."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_globals.get("__name__", "").partition(".")[0] == "huggingface_hub"


def _translated(error: BaseException, name: str, options: Mapping[str, Any], writing: bool) -> GlowQError:
    causes = list(_causes(error))
    kinds = tuple(map(type, causes))

    def has_cause(*wanted: type[BaseException]) -> bool:
        return any(issubclass(kind, wanted) for kind in kinds)

    if writing and isinstance(error, RuntimeError):  # hf_xet failed to upload a file
        return _interrupted(causes, name)
    status = next((cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    revision, where = options.get("revision"), constants.ENDPOINT
    if has_cause(HFValidationError):
        form = "expected name or organization/name, of letters, digits, '-', '_' and '.'"
        if writing:
            return HubError(f"{name!r} is no name that a Hub repository can have: {form}.")
        return ModelNotFoundError(f"{name!r} is neither a folder nor a Hub repository's name ({form}).")
    if has_cause(GatedRepoError):
        return HubError(
            f"{name} is gated: ask for access at {where}/{name}, then `hf auth login` with a token of that account."
        )
    if has_cause(RevisionNotFoundError):
        return ModelNotFoundError(
            f"{name} has no branch, tag or commit {revision!r}; {where}/{name}/commits lists them."
        )
    if has_cause(LocalTokenNotFoundError) or (status == 401 and (writing or not has_cause(RepositoryNotFoundError))):
        return HubError(f"{where} needs a valid token; yours is missing or expired: `hf auth login`, or give --token.")
    if has_cause(RepositoryNotFoundError):
        return ModelNotFoundError(
            f"{name!r} is neither a folder nor a Hub repository that you may read: check the name, or `hf auth login` "
            "for a private one."
        )
    if status == 403 and writing:
        return HubError(
            f"{where} does not let you write {name}: it belongs to somebody else, or your token may only read. "
            "Take a name of your own, a token that may write, or --create-pr."
        )
    if status == 403:
        return HubError(f"{where} does not let you read {name}: `hf auth login` with a token that may.")
    return _unreachable(error, causes, name, options, writing)


def _unreachable(
    error: BaseException, causes: list[BaseException], name: str, options: Mapping[str, Any], writing: bool
) -> GlowQError:
    """The error for a missing answer, or for an answer that says nothing about the repository."""
    where, at = constants.ENDPOINT, f" at {options['revision']}" if options.get("revision") else ""
    offline = any(isinstance(cause, OfflineModeIsEnabled) for cause in causes)
    if offline and writing:
        return HubError("HF_HUB_OFFLINE is set, so that nothing can be pushed; unset it.")
    if offline or options.get("local_files_only"):
        how = "HF_HUB_OFFLINE is set" if offline else "local_files_only was asked for"
        return ModelNotFoundError(
            f"{name!r} is neither a folder nor a Hub repository that is in the cache{at} with all its files, and "
            f"{how}: load it once with the network."
        )
    transport = next((cause for cause in causes if _is_transport(cause)), None)
    if transport is not None and writing:
        return _interrupted([transport], name)
    if transport is not None:
        return HubError(f"{name!r} is not in the cache{at}, and {where} cannot be reached ({_described(transport)}).")
    if any(getattr(cause, "errno", None) == errno.ENOSPC for cause in causes):
        return OutputError(f"{name} cannot be downloaded: the disk is full; HF_HOME names another place for the cache.")
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return ReadError(f"{error.filename} cannot be read or written ({error.strerror}), which {name} needs.")
    if any(isinstance(cause, LocalEntryNotFoundError | HfHubHTTPError) for cause in causes):
        return HubError(f"{where} could not answer for {name!r}{at}: {_described(causes[-1])}. Try again later.")
    return HubError(f"{name}: {_described(error)}")


def _interrupted(causes: list[BaseException], name: str) -> HubError:
    return HubError(
        f"the connection to {constants.ENDPOINT} was refused or lost ({_described(causes[-1])}); {name} holds either "
        "all files of the upload or none. Run the same command again: complete files are not sent again."
    )


def _is_transport(error: BaseException) -> bool:
    return isinstance(error, _TransportError | ConnectionError) and not hasattr(error, "response")


def _described(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
