"""Turn what libraries raise when they load a model into one-line errors of glowq."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError

from ..errors import ConfigError, CorrectionError, GlowQError, ModelNotFoundError, ReadError, one_line
from ..utils.names import split_revision

__all__ = ["loading", "named", "parsing"]


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn what libraries raise when they cannot load `name` into a one-line error of glowq.

    Raises:
        ModelNotFoundError: the model does not exist.
        ReadError: a file of it cannot be read.
        CorrectionError: a safetensors file of it is corrupt or truncated.
        ConfigError: a library refuses its configuration or its files.
    """
    from safetensors import SafetensorError

    try:
        yield
    except GlowQError:
        raise
    except SafetensorError as error:
        raise CorrectionError(
            f"a safetensors file of {name!r} is corrupt or truncated ({one_line(error)}); download or save it again."
        ) from error
    except OSError as error:
        # Errors of transformers and huggingface_hub have none. Any other number than ENOENT is of an existing file.
        if error.errno not in (None, errno.ENOENT):
            raise ReadError(f"{name!r} cannot be loaded: {one_line(error)}") from error
        raise ModelNotFoundError(f"{name!r} cannot be loaded: {one_line(error)}") from error
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{name!r} cannot be loaded: {one_line(error)}") from error


@contextmanager
def parsing(name: str, what: str) -> Iterator[None]:
    """Turn whatever a library raises about the content of a file into an error of glowq.

    Raises:
        ConfigError: the library raised something that is neither an error of glowq nor about a missing file.
    """
    try:
        yield
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(name, what, error) from error
    except (GlowQError, OSError, ValueError, ImportError, MemoryError):
        raise
    except Exception as error:  # a parser that meets a value of another type raises anything
        if type(error).__name__ in ("OutOfMemoryError", "SafetensorError") or _is_of_glowq(error):
            raise
        raise _damaged(name, what, error) from error


def _is_of_glowq(error: Exception) -> bool:
    """Whether code of glowq raised an error, while a library called it: then it is a mistake in glowq."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__")).partition(".")[0] == "glowq"


def _damaged(name: str, what: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{what} of {name!r} cannot be read: damaged, or of a kind that no installed library knows "
        f"({type(error).__name__}: {one_line(error)}). Download or save the model again."
    )


def named(name: str) -> dict[str, str]:
    """Keyword arguments of `from_pretrained` for a folder, "org/model" or "org/model@revision"."""
    repository, revision = split_revision(name)
    return {"pretrained_model_name_or_path": repository, **({"revision": revision} if revision else {})}
